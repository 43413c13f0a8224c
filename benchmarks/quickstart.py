"""The quickstart on several seeds, with its penalty and without: does gold rise, and what is the penalty for?

    python benchmarks/quickstart.py --seeds 42 43 44 --folder /tmp/quickstart        about 10 minutes a seed, 2 cores

Each seed trains its own SFT model and reward model, then REINFORCE with the recipe's `kl.beta` and once more with 0, in
a folder of its own; a finished run is not run again. Held-out figures are paired differences over the 256 prompts (the
same sampling noise before and after). Writes results/quickstart.json and of the first seed docs/images/quickstart.png.

Exits with 1 where, on any seed, gold does not rise by more than five standard errors, or the run without penalty does
not end with a higher reward and a lower gold score than the recipe's run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import record

from rlhf.programs.outcome import Change, outcome

ROOT = Path(__file__).resolve().parents[1]
PANELS = {
    "reward/score_mean": "reward model's score",
    "reward/gold_mean": "hidden gold score",
    "kl/reference": "KL from the SFT model, nats",
}


@dataclass(frozen=True)
class Row:
    """Held-out figures of one run."""

    seed: int
    beta: str
    gold_before: float
    gold_after: float
    gold_difference: float
    gold_error: float
    reward_after: float
    kl_after: float
    step_seconds: float

    @property
    def standard_errors(self) -> float:
        return self.gold_difference / self.gold_error


def run(folder: Path, seed: int) -> None:
    """The three stages and the run without penalty; what is finished says so and is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = [
        ["quickstart", f"run.seed={seed}"],
        ["train", "quickstart/reinforce", "run.name=no-kl", "kl.beta=0", f"run.seed={seed}"],
    ]
    for arguments in commands:
        subprocess.run([sys.executable, "-m", "rlhf", *arguments], cwd=folder, check=True)


def row(folder: Path, seed: int, name: str, beta: str) -> Row:
    found = outcome(folder / "runs" / name)
    if found is None:
        raise SystemExit(f"{folder / 'runs' / name} has no held-out completions from before and after")
    gold: Change = found.changes["gold"]
    seconds = [line["time/step_seconds"] for line in lines(folder / "runs" / name) if "time/step_seconds" in line]
    return Row(
        seed=seed,
        beta=beta,
        gold_before=round(gold.before, 3),
        gold_after=round(gold.after, 3),
        gold_difference=round(gold.difference, 3),
        gold_error=round(gold.error, 3),
        reward_after=round(found.changes["reward"].after, 3),
        kl_after=round(found.changes["kl"].after, 3),
        step_seconds=round(sum(seconds) / len(seconds), 2),
    )


def lines(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def picture(folder: Path, seed: int) -> None:
    """Training curves with and without the penalty, side by side."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.1))
    for name, label, colour in (
        ("quickstart-reinforce", "recipe", "#2563a8"),
        ("no-kl-reinforce", "kl.beta=0", "#c2410c"),
    ):
        rows = lines(folder / "runs" / name)
        for axes, (metric, title) in zip(panels, PANELS.items(), strict=True):
            points = [(line["step"], line[metric]) for line in rows if metric in line]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, label=label)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right", title=f"seed {seed}")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "quickstart.png", dpi=100)


def failures(rows: list[Row]) -> list[str]:
    """What a seed did not show, one line each."""
    found = []
    for kept, free in zip(rows[::2], rows[1::2], strict=True):
        if kept.standard_errors <= 5:
            found.append(f"seed {kept.seed}: gold rose by {kept.standard_errors:.1f} standard errors")
        if not (free.reward_after > kept.reward_after and free.gold_after < kept.gold_after):
            found.append(f"seed {kept.seed}: without penalty reward {free.reward_after}, gold {free.gold_after}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--folder", type=Path, required=True, help="each seed gets a folder in it")
    parser.add_argument("--read-only", action="store_true", help="runs lie there already: read them")
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        folder = given.folder / str(seed)
        if not given.read_only:
            run(folder, seed)
        rows += [row(folder, seed, "quickstart-reinforce", "recipe"), row(folder, seed, "no-kl-reinforce", "0")]
    for each in rows:
        print({**asdict(each), "standard_errors": round(each.standard_errors, 1)})
    picture(given.folder / str(given.seeds[0]), given.seeds[0])
    record.write("quickstart", {"heldout_prompts": 256}, [asdict(each) for each in rows])
    missed = failures(rows)
    print("\n".join(missed) or "every seed shows both")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
