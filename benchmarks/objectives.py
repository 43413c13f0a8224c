"""Every objective on one recipe, at equal completions; and the main ones as frontiers of gold against KL.

    python benchmarks/objectives.py --quick                         9 minutes, 2 cores: the table on the quickstart
    python benchmarks/objectives.py --quick --rows reviews/         30 minutes: and on movie reviews
    python benchmarks/objectives.py                                 2 hours: tuning, frontiers, comparison

All take the recipe's SFT model and reward model (seed 42) from FOLDER/runs, where `make quickstart` leaves them, or
train them there first (4 minutes). Every objective gets the same prompts, reward model and number of completions. TRL's
trainers (dev extra) start from the same weights and are handed the same reward as a callable; all are judged by one
evaluation: 128 held-out prompts, the same sampling noise before and after.

The table: the judge's score, KL, length, seconds and memory of one short run of each. On the quickstart the judge is
the hidden gold score; on the reviews it is the share of continuations that an independent classifier (judge.py) calls
positive. No two reviews share a prompt, so what learns from given pairs is not in that table. The frontiers are
frontiers.py.

Every finished run is a line of --record, and a run that has one is not run again: the record that comes with this file
prints the table at once. --record NEW measures this machine.

Writes results/objectives.json and docs/images/objectives.png, when the frontiers are asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import frontiers
import record
from runs import ROOT, Bench, Job

from rlhf.objectives.presets import OBJECTIVES

RUNS = record.RESULTS / "objectives_runs.jsonl"
TABLES: Mapping[str, Mapping[str, Any]] = {
    "quickstart": {"lr": 5e-4, "beta": 0.6, "steps": 5, "prompts": 16},
    "reviews": {"lr": 6e-4, "beta": 0.22, "steps": 20, "prompts": 48},
}


def every_objective(recipe: str) -> dict[str, tuple[str, ...]]:
    """Name in the table → overrides: all that train a policy on the recipe's rows, DPO twice, and TRL's."""
    programs = ("policy", "preference") if recipe == "quickstart" else ("policy",)
    trained = [name for name, entry in OBJECTIVES.items() if entry.program in programs]
    ours: dict[str, tuple[str, ...]] = {name: (f"objective={name}",) for name in trained}
    ours["trpo"] = (*ours["trpo"], "trpo.iterations=4")
    ours["dpo_online"] = ("objective=dpo", "dpo.online=true")
    return {**ours, "trl_rloo": (), "trl_dpo": ()} if recipe == "quickstart" else ours


def table(bench: Bench, recipe: str) -> list[dict[str, Any]]:
    asked = every_objective(recipe).items()
    return [bench.row(Job(method=m, overrides=o, seed=42, recipe=recipe, **TABLES[recipe])) for m, o in asked]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    judged = "gold" if "gold" in rows[0] else "positive"
    before = rows[0][f"{judged}_before"]
    print(f"\n{judged} before: {before:.3f}")
    print(f"{'objective':32s}{judged:>9s}{'reward':>8s}{'KL':>7s}{'tokens':>8s}{'training s':>12s}{'MiB':>7s}")
    for row in rows:
        figures = f"{row[judged]:9.3f}{row['reward']:8.3f}{row['kl']:7.2f}{row['tokens']:8.1f}"
        print(f"{row['method']:32s}{figures}{row['step_seconds']:12.1f}{row['peak_mib']:7d}")


def compare_frontiers(bench: Bench, methods: Sequence[str], seeds: Sequence[int]) -> None:
    found = frontiers.frontiers(bench, methods, seeds)
    said = frontiers.comparison(found["rows"], found["rloo_at_the_rate_of_trl"])
    for pair, lines in said["pairs"].items():
        print(pair, *lines, sep="\n    ")
    frontiers.picture(found["rows"], said["gold_of_sft"])
    settings = {"margin": frontiers.MARGIN, "rates": found["rates"], **said}
    record.write("objectives", settings, [*found["rows"], *found["rloo_at_the_rate_of_trl"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT, help="runs lie here (default: the repository)")
    parser.add_argument("--record", type=Path, default=RUNS, help="finished runs, a line each")
    parser.add_argument("--quick", action="store_true", help="the tables only")
    parser.add_argument("--rows", type=Path, help="reviews: a folder with train.jsonl and test.jsonl (text, label)")
    parser.add_argument("--methods", nargs="+", default=list(frontiers.METHODS), choices=list(frontiers.METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(frontiers.SEEDS), help="2 to 10")
    given = parser.parse_args()
    bench = Bench.at(given.folder, given.record, given.rows)
    for recipe in ("quickstart", "reviews") if given.rows else ("quickstart",):
        if given.quick:
            show(table(bench, recipe))
    if not given.quick:
        compare_frontiers(bench, given.methods, given.seeds)


if __name__ == "__main__":
    main()
