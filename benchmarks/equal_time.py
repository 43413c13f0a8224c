"""The main objectives at equal seconds of training instead of equal completions.

    OMP_NUM_THREADS=1 python benchmarks/equal_time.py             half an hour, alone on the machine

On the quickstart, with the models that `make quickstart` leaves (objectives.py says more), 16 prompts × 4 completions a
step. Each method takes five steps on a seed that the table does not use, and then as many steps as fit into --seconds
at that speed, with the learning rate that the frontiers found and one β. Starting, evaluating and saving are not
counted for anybody.

Finished runs are lines of results/equal_time_runs.jsonl (--record), and are not made again. Writes
results/equal_time.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import frontiers
import record
from runs import ROOT, Bench, Job

BETA, PACE = 0.3, 5


def job(method: str, lr: float, seed: int, steps: int) -> Job:
    overrides = frontiers.METHODS[method]
    return Job(method=method, overrides=overrides, lr=lr, beta=BETA, seed=seed, steps=steps, prompts=16)


def fitting_steps(bench: Bench, method: str, lr: float, seconds: float) -> int:
    """Steps that fit into ``seconds`` at the pace of a short run, whose first step, which warms up, counts too."""
    pace: float = bench.row(job(method, lr, frontiers.TUNING_SEED, PACE))["step_seconds"] / PACE
    return max(1, round(seconds / pace))


def rows_of(bench: Bench, method: str, lr: float, seconds: float, seeds: list[int]) -> list[dict[str, Any]]:
    steps = fitting_steps(bench, method, lr, seconds)
    return [bench.row(job(method, lr, seed, steps)) for seed in seeds]


def summary(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    golds = [row["gold"] for row in rows]
    means = {name: round(fmean(row[name] for row in rows), 3) for name in ("gold", "reward", "kl", "step_seconds")}
    spread = {"gold_low": min(golds), "gold_high": max(golds), "completions": rows[0]["completions"]}
    return {"method": method, "lr": rows[0]["lr"], **means, **spread}


def rates() -> Mapping[str, float]:
    """What the frontiers' tuning seed chose."""
    found: Mapping[str, float] = json.loads((record.RESULTS / "objectives.json").read_text(encoding="utf-8"))["rates"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT, help="runs lie here (default: the repository)")
    parser.add_argument("--record", type=Path, default=record.RESULTS / "equal_time_runs.jsonl")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    bench, lines = Bench.at(given.folder, given.record), []
    for method, lr in rates().items():
        lines.append(summary(method, rows_of(bench, method, lr, given.seconds, given.seeds)))
        print(lines[-1], flush=True)
    record.write("equal_time", {"seconds": given.seconds, "beta": BETA, "seeds": given.seeds}, lines)


if __name__ == "__main__":
    main()
