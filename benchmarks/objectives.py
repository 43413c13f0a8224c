"""Every objective on one recipe, at equal completions; and the five main ones as frontiers of gold against KL.

    python benchmarks/objectives.py --folder /tmp/objectives --quick         9 minutes, 2 cores: the table
    python benchmarks/objectives.py --folder /tmp/objectives                 hours: tuning, frontiers, comparison

Both take the quickstart's SFT model and reward model (seed 42) from FOLDER/runs, or train them there first (4
minutes). Every objective gets the same prompts, reward model and number of completions. TRL's trainers (dev extra)
start from the same weights and are handed the same reward as a callable; all are judged by one evaluation: 128 held-
out prompts, the same sampling noise before and after.

The table: gold score, KL, length, seconds and memory of one short run of each. The frontiers: `METHODS` (`reinforce`
is leave-one-out with the exact KL), each with the learning rate that does best on the tuning seed, on `SEEDS` fresh
seeds at every β of `BETAS`. Gold is interpolated in √KL between the runs of a seed: chords of a concave curve, so a
method whose runs lie far from a root is judged a little low. Differences between methods are paired by seed, given
one SFT model, one reward model and one set of held-out prompts, and not corrected for their number. `MARGIN` was set
before the first run. Every finished run is a line of results/objectives_runs.jsonl, and a run that has one is not run
again.

Writes results/objectives.json and docs/images/objectives.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import record

from rlhf.objectives.presets import OBJECTIVES
from rlhf.programs.outcome import outcome

ROOT = Path(__file__).resolve().parents[1]
RUNS = record.RESULTS / "objectives_runs.jsonl"
EXACT = ("objective=reinforce", "kl.estimator=exact")
METHODS: Mapping[str, tuple[str, ...]] = {
    "reinforce": EXACT,
    "rloo": ("objective=rloo",),
    "rloo_2_updates": ("objective=rloo", "reinforce.updates_per_rollout=2"),  # as many optimizer steps as PPO takes
    "ppo": ("objective=ppo",),
    "grpo": ("objective=grpo",),
    "reinforce_plus_plus": ("objective=reinforce_plus_plus",),
    "trl_rloo": (),
}
BETAS = (0.0, 0.1, 0.3, 0.8)
RATES = (5e-4, 1e-3)  # with 2.5e-4, 20 steps end below √KL = 2 even without a penalty
TUNING_SEED, TUNING_BETA = 100, 0.1
SEEDS = (1, 2, 3, 4, 5)
ROOTS = (1.0, 2.0, 3.0)  # √KL at which gold is compared
MARGIN = 0.15  # gold; the recipe gains about 1
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 2, 3, … 10 seeds


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. steps × prompts × 4 completions (pairs of as many prompts, offline). A record with other overrides is
    another run; one of another commit is not, so that a comparison can go on after a change elsewhere."""

    method: str
    overrides: tuple[str, ...]
    lr: float
    beta: float
    seed: int
    steps: int
    prompts: int

    @property
    def name(self) -> str:
        return f"{self.method}-b{self.beta:g}-lr{self.lr:g}-s{self.seed}-{self.steps}x{self.prompts}"

    @property
    def common(self) -> list[str]:
        """What every run is told, whatever trains it."""
        return [f"kl.beta={self.beta!r}", f"optim.lr={self.lr!r}", f"run.seed={self.seed}"]


@dataclass
class Bench:
    """Where runs happen, and what is known already."""

    folder: Path
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> Bench:
        folder.mkdir(parents=True, exist_ok=True)
        lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
        return cls(folder.resolve(), {row["run"]: row for row in map(json.loads, lines)})

    def models(self) -> None:
        """The quickstart's SFT model and reward model; what is finished is left alone."""
        for stage in ("sft", "reward"):
            if not (self.folder / "runs" / f"quickstart-{stage}" / "final").is_dir():
                self.command([sys.executable, "-m", "rlhf", "train", f"quickstart/{stage}"])

    def row(self, job: Job) -> dict[str, Any]:
        """The figures of a run, from the record or by running it."""
        known = self.known.get(job.name)
        if known is None or known["overrides"] != list(job.overrides):
            found = {"run": job.name, "overrides": list(job.overrides), **self._run(job), "commit": record.commit()}
            with RUNS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            self.known[job.name] = found
            print(found, flush=True)
        return self.known[job.name]

    def _run(self, job: Job) -> dict[str, Any]:
        if job.method.startswith("trl_"):
            seconds, peak = self._trl(job)
            run = self._judged(job)
        else:
            sizes = [f"run.steps={job.steps}", f"batch.prompts_per_step={job.prompts}", "eval.every_steps=null"]
            names = [f"run.name={job.name}", "run.output_dir=runs/{name}", "eval.samples=128", "checkpoint.keep=1"]
            settings = [*job.overrides, *job.common, *sizes, *names]
            seconds, peak = self.command([sys.executable, "-m", "rlhf", "train", "quickstart/reinforce", *settings])
            run = self.folder / "runs" / job.name
        found = outcome(run)
        assert found is not None
        side = 0 if job.method.startswith("trl_") else 1  # TRL's policy is the one that the judging run starts from
        value = {name: (change.before, change.after)[side] for name, change in found.changes.items()}
        return {
            "method": job.method,
            "beta": job.beta,
            "lr": job.lr,
            "seed": job.seed,
            "completions": job.steps * job.prompts * 4,
            **{name: round(value[name], 4) for name in ("gold", "reward", "kl", "tokens")},
            "gold_before": round(found.changes["gold"].before, 4) if side else None,
            "seconds": round(seconds, 1),
            "step_seconds": round(self._step_seconds(job), 1),
            "peak_mib": round(peak / 2**20),
        }

    def _step_seconds(self, job: Job) -> float:
        """Of training alone: no start, no evaluation, no checkpoint."""
        if job.method.startswith("trl_"):
            return float((self.folder / "trl" / job.name / "seconds.txt").read_text())
        lines = (self.folder / "runs" / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return float(sum(json.loads(line).get("time/step_seconds", 0.0) for line in lines))

    def _trl(self, job: Job) -> tuple[float, int]:
        """TRL's trainer in a process of its own; its policy is left in ``trl/NAME``."""
        script = str(ROOT / "benchmarks" / "trl_trainers.py")
        sizes = ["--steps", str(job.steps), "--prompts", str(job.prompts), "--out", f"trl/{job.name}"]
        chosen = ["--lr", repr(job.lr), "--beta", repr(job.beta), "--seed", str(job.seed)]
        return self.command([sys.executable, script, job.method.removeprefix("trl_"), *sizes, *chosen])

    def _judged(self, job: Job) -> Path:
        """A run of ours that starts from TRL's policy: its evaluation before the first step is what is wanted."""
        name = f"{job.name}-judged"
        models = [f"policy.path=trl/{job.name}", "reference.path=runs/quickstart-sft/final"]
        least = ["run.steps=1", "batch.prompts_per_step=1", "rollout.samples_per_prompt=2", "eval.every_steps=null"]
        names = [f"run.name={name}", "run.output_dir=runs/{name}", "eval.samples=128", "run.seed=" + str(job.seed)]
        self.command([sys.executable, "-m", "rlhf", "train", "quickstart/reinforce", *models, *least, *names])
        return self.folder / "runs" / name

    def command(self, command: list[str]) -> tuple[float, int]:
        """(wall seconds, peak bytes of the process) of a command in the folder; its output goes to a file."""
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        with (self.folder / "log.txt").open("a") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed; see {self.folder / 'log.txt'}")
        return time.monotonic() - started, used.ru_maxrss * 1024


# --- the table -------------------------------------------------------------------------------------------------------


def every_objective() -> dict[str, tuple[str, ...]]:
    """Name in the table → overrides: all that train a policy, DPO twice, and TRL's."""
    trained = [name for name, entry in OBJECTIVES.items() if entry.program in ("policy", "preference")]
    ours: dict[str, tuple[str, ...]] = {name: (f"objective={name}",) for name in trained}
    ours["trpo"] = (*ours["trpo"], "trpo.iterations=4")
    return {**ours, "dpo online": ("objective=dpo", "dpo.online=true"), "trl_rloo": (), "trl_dpo": ()}


def table(bench: Bench, steps: int, prompts: int) -> list[dict[str, Any]]:
    rows = []
    for name, overrides in every_objective().items():
        label = name.replace(" ", "_")
        job = Job(method=label, overrides=overrides, lr=5e-4, beta=0.6, seed=42, steps=steps, prompts=prompts)
        rows.append(bench.row(job))
    return rows


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{'objective':32s}{'gold':>8s}{'reward':>8s}{'KL':>7s}{'tokens':>8s}{'training s':>12s}{'MiB':>7s}")
    for row in rows:
        figures = f"{row['gold']:8.3f}{row['reward']:8.3f}{row['kl']:7.2f}{row['tokens']:8.1f}"
        print(f"{row['method']:32s}{figures}{row['step_seconds']:12.1f}{row['peak_mib']:7d}")


# --- the frontiers ---------------------------------------------------------------------------------------------------


def frontier_job(method: str, lr: float, beta: float, seed: int) -> Job:
    return Job(method=method, overrides=METHODS[method], lr=lr, beta=beta, seed=seed, steps=20, prompts=16)


def best_rate(bench: Bench, method: str) -> float:
    """The rate that ends with the highest gold on the tuning seed, which no comparison uses: of ``RATES``, which go on
    by factors of 2 while the last is the best."""
    rates = list(RATES)

    def gold(lr: float) -> float:
        return float(bench.row(frontier_job(method, lr, TUNING_BETA, TUNING_SEED))["gold"])

    while max(rates, key=gold) == rates[-1] and len(rates) < len(RATES) + 2:
        rates.append(2 * rates[-1])
    return max(rates, key=gold)


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Gold at √KL = ``at`` on the line through (√KL, gold) points; None beyond the last."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def golds(rows: Sequence[Mapping[str, Any]], start: float) -> dict[float, float | None]:
    """Of the runs of one method and seed: gold at each of ``ROOTS``; every frontier begins at the SFT model."""
    points = [(0.0, start), *((math.sqrt(max(row["kl"], 0.0)), row["gold"]) for row in rows)]
    return {root: interpolated(points, root) for root in ROOTS}


def compared(
    ours: Mapping[int, Mapping[float, float | None]], other: Mapping[int, Mapping[float, float | None]]
) -> list[dict[str, Any]]:
    """ours − other at each root over the seeds that reach it: mean, 95 % interval, and what it says."""
    found = []
    for root in ROOTS:
        pairs = [(ours[seed][root], other[seed][root]) for seed in ours if seed in other]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(differences) < max(2, len(pairs)):  # those that get there are not any seeds
            found.append({"root_kl": root, "seeds": len(differences), "verdict": "not reached by every seed"})
            continue
        mean = sum(differences) / len(differences)
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
        half = T975[len(differences) - 2] * spread / math.sqrt(len(differences))
        found.append(
            {
                "root_kl": root,
                "seeds": len(differences),
                "difference": round(mean, 3),
                "low": round(mean - half, 3),
                "high": round(mean + half, 3),
                "verdict": verdict(mean - half, mean + half),
            }
        )
    return found


def verdict(low: float, high: float) -> str:
    """What a 95 % interval of (ours − other) says with the margin."""
    if low > 0:
        return "superior"
    if low > -MARGIN and high < MARGIN:
        return "equivalent"
    if low > -MARGIN:
        return "not inferior"
    return "inferior" if high < 0 else "undecided"


def frontiers(bench: Bench, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Seed by seed, so that whatever is finished can be compared."""
    rates = {method: best_rate(bench, method) for method in methods}
    rows = [
        bench.row(frontier_job(method, rates[method], beta, seed))
        for seed in seeds
        for method in methods
        for beta in BETAS
    ]
    return {"rates": rates, "rows": rows}


def comparison(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    starts = [row["gold_before"] for row in rows if row["gold_before"] is not None]
    start = sum(starts) / len(starts)
    curves: dict[str, dict[int, dict[float, float | None]]] = {}
    for method, seed in {(row["method"], row["seed"]) for row in rows}:
        mine = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
        if len(mine) == len(BETAS):
            curves.setdefault(method, {})[seed] = golds(mine, start)
    ours = curves.get("reinforce", {})
    pairs = {f"reinforce - {name}": compared(ours, other) for name, other in curves.items() if name != "reinforce"}
    if {"rloo", "trl_rloo"} <= curves.keys():
        pairs["rloo - trl_rloo"] = compared(curves["rloo"], curves["trl_rloo"])
    return {"gold_of_sft": round(start, 3), "pairs": pairs}


def picture(rows: Sequence[Mapping[str, Any]], start: float) -> None:
    """Mean gold over seeds at each β, against √KL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = []
        for beta in BETAS:
            mine = [row for row in rows if row["method"] == method and row["beta"] == beta]
            if mine:
                roots, gold = [math.sqrt(max(row["kl"], 0.0)) for row in mine], [row["gold"] for row in mine]
                points.append((sum(roots) / len(mine), sum(gold) / len(mine)))
        axes.plot(*zip((0.0, start), *sorted(points), strict=True), marker="o", linewidth=1.8, label=method)
    axes.set(xlabel="√KL from the SFT model (nats)", ylabel="hidden gold score, held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "objectives.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="runs lie here")
    parser.add_argument("--quick", action="store_true", help="the table only")
    parser.add_argument("--steps", type=int, default=5, help="of each run of the table (default 5)")
    parser.add_argument("--prompts", type=int, default=16, help="of each step of the table (default 16)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="2 to 10")
    given = parser.parse_args()
    bench = Bench.at(given.folder)
    bench.models()
    if given.quick:
        show_table(table(bench, given.steps, given.prompts))
        return
    found = frontiers(bench, given.methods, given.seeds)
    said = comparison(found["rows"])
    for pair, lines in said["pairs"].items():
        print(pair, *lines, sep="\n    ")
    picture(found["rows"], said["gold_of_sft"])
    short = [row for row in bench.known.values() if row["run"].endswith("-5x16")]
    settings = {"margin": MARGIN, "rates": found["rates"], **said, "table": short}
    record.write("objectives", settings, found["rows"])


if __name__ == "__main__":
    main()
