"""The reviews recipes on real rows, judged by something that is not the reward model; baselines and KL compared.

    python benchmarks/reviews.py --rows reviews/ --folder /tmp/reviews              8 minutes a seed, 2 cores
    python benchmarks/reviews.py --rows reviews/ --folder /tmp/reviews --compare    and 3 minutes a variant and seed

--rows: a folder with train.jsonl and test.jsonl (text, label). Each seed trains its own SFT model and reward model with
the shipped recipes, then REINFORCE; --compare repeats REINFORCE with every variant below at equal completions. Finished
runs are not run again. The judge (benchmarks/judge.py) reads prompt and completion of the held-out samples.

Writes results/reviews.json. Exits with 1 where a figure is outside its bound (`BOUNDS`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import record
from judge import Judge, words

from rlhf.programs.outcome import outcome

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "reward", "reinforce")
VARIANTS: dict[str, tuple[str, ...]] = {
    "shrinkage": ("reinforce.baseline=shrinkage",),
    "batch-mean": ("reinforce.baseline=batch_mean",),
    "exact": ("kl.estimator=exact",),
}
BOUNDS = {
    "reward_pairs": (0.77, 1.0),  # of every seed; the mean of all seeds has a bound of its own
    "positive_after": (0.85, 1.0),
    "kl": (0.0, 8.0),
    "length_ratio": (0.75, 1.25),
    "unknown_rise": (-1.0, 0.01),
    "minutes": (0.0, 8.0),
}
MEAN_REWARD_PAIRS = 0.79


@dataclass(frozen=True)
class Row:
    """One REINFORCE run. Shares are of held-out continuations; minutes: wall time of the three stages together."""

    seed: int
    variant: str
    reward_pairs: float
    positive_before: float
    positive_after: float
    reward_before: float
    reward_after: float
    reward_error: float
    kl: float
    length_ratio: float
    unknown_before: float
    unknown_after: float
    minutes: float

    @property
    def unknown_rise(self) -> float:
        return self.unknown_after - self.unknown_before


def train(stage: str, rows: Path, folder: Path, seed: int, *overrides: str) -> None:
    """One stage through ``accelerate launch``; what is finished says so and is left alone."""
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
    data = [f"data.train.0.path={rows / 'train.jsonl'}", f"data.eval.0.path={rows / 'test.jsonl'}"]
    recipe = ["-m", "rlhf", "train", str(ROOT / "recipes" / "reviews" / f"{stage}.yaml")]
    command = [sys.executable, "-m", *launch, *recipe, *data, f"run.seed={seed}", *overrides]
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run(command, cwd=folder, check=True, env=environment)


def reward_pairs(folder: Path, rows: Path) -> float:
    """Accuracy of the reward model over all positive × negative held-out pairs, which is the area under its curve."""
    written = folder / "reward.json"
    if not written.exists():
        command = [
            "rlhf",
            "evaluate",
            "runs/reviews-reward",
            "--data",
            str(rows / "test.jsonl"),
            "--output",
            written.name,
        ]
        subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True)
    return float(json.loads(written.read_text(encoding="utf-8"))["figures"]["eval/auc"])


def read(folder: Path, name: str, variant: str, seed: int, pairs: float, judge: Judge) -> Row:
    found = outcome(folder / "runs" / name)
    if found is None:
        raise SystemExit(f"{folder / 'runs' / name} has no held-out completions from before and after")
    before, after = ([pair[side] for pair in found.pairs] for side in (0, 1))
    reward, kl = found.changes["reward"], found.changes["kl"]
    return Row(
        seed=seed,
        variant=variant,
        reward_pairs=round(pairs, 3),
        positive_before=round(judge.positive_share(whole(before)), 3),
        positive_after=round(judge.positive_share(whole(after)), 3),
        reward_before=round(reward.before, 3),
        reward_after=round(reward.after, 3),
        reward_error=round(reward.error, 3),
        kl=round(kl.after, 2),
        length_ratio=round(length(after) / length(before), 3),
        unknown_before=round(judge.unknown_share(completions(before)), 4),
        unknown_after=round(judge.unknown_share(completions(after)), 4),
        minutes=round(sum(minutes(folder / "runs" / run) for run in ("reviews-sft", "reviews-reward", name)), 2),
    )


def whole(samples: Sequence[Any]) -> list[str]:
    return [sample["prompt"] + sample["completion"] for sample in samples]


def completions(samples: Sequence[Any]) -> list[str]:
    return [sample["completion"] for sample in samples]


def length(samples: Sequence[Any]) -> float:
    """Words a completion."""
    return sum(len(words(text)) for text in completions(samples)) / len(samples)


def minutes(run: Path) -> float:
    """Wall time of a run from its own record, the models' loading included and the interpreter's start not."""
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    taken = datetime.fromisoformat(told["ended"]) - datetime.fromisoformat(told["started"])
    return taken.total_seconds() / 60


def failures(rows: Sequence[Row]) -> list[str]:
    """What the recipe (not its variants) did not show, one line each."""
    recipe = [row for row in rows if row.variant == "recipe"]
    missed = [
        f"seed {row.seed}: {name} {getattr(row, name)} is outside {low} to {high}"
        for row in recipe
        for name, (low, high) in BOUNDS.items()
        if not low <= getattr(row, name) <= high
    ]
    mean = sum(row.reward_pairs for row in recipe) / len(recipe)
    return missed + ([f"mean reward_pairs {mean:.3f} < {MEAN_REWARD_PAIRS}"] if mean < MEAN_REWARD_PAIRS else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--folder", type=Path, required=True, help="each seed gets a folder in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--compare", action="store_true", help=f"also {', '.join(VARIANTS)}")
    given = parser.parse_args()
    given.rows = given.rows.resolve()
    judge = Judge.trained(given.rows / "train.jsonl")
    rows = []
    for seed in given.seeds:
        folder = given.folder / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        for stage in STAGES:
            train(stage, given.rows, folder, seed)
        pairs = reward_pairs(folder, given.rows)
        rows.append(read(folder, "reviews-reinforce", "recipe", seed, pairs, judge))
        for variant, overrides in VARIANTS.items() if given.compare else ():
            train("reinforce", given.rows, folder, seed, f"run.name={variant}", *overrides)
            rows.append(read(folder, f"{variant}-reinforce", variant, seed, pairs, judge))
        print(*rows, sep="\n")
    judged = {"judge_pair_accuracy": round(judge.pair_accuracy(given.rows / "test.jsonl"), 3)}
    record.write("reviews", {**judged, "heldout_prompts": 500}, [asdict(row) for row in rows])
    missed = failures(rows)
    print("\n".join(missed) or "every figure is within its bound")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
