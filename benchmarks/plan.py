"""Bytes that `rlhf plan` predicts against bytes that a real step holds, configuration by configuration, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan.py                   10 minutes
    python benchmarks/plan.py --only reinforce "zero 2" --json    without recording

Each configuration (plan_cases.py) runs two steps in processes of its own; the second one is watched: all CPU tensors
alive at its beginning, and every allocation within it. Predicted and measured are the peaks of one process, whole and
by part of the step; the update's part includes the optimizer step. Two processes run under DeepSpeed with a small
bucket.

Writes results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from plan_cases import CASES, Case, make

from rlhf.programs.plan import Options, plan_of
from rlhf.recipe import load_recipe

HERE = Path(__file__).parent


def predicted(case: Case, folder: Path) -> dict[str, Any]:
    launched = str(folder / "accelerate.yaml") if case.stage is not None else None
    recipe = load_recipe(str(folder / "recipe.yaml"))
    plan = plan_of(recipe, Options(accelerate=launched), folder)
    parts = {phase.name: round(phase.total) for phase in plan.phases}
    parts["update"] = max(parts["update"], parts.pop("optimizer step"))
    return {"held": round(plan.phases[0].held), "peak": round(plan.peak.total), "parts": parts}


def measured(case: Case, folder: Path) -> dict[str, Any]:
    places = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable]
    if case.stage is not None:
        config = str(folder / "accelerate.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    command = [*launcher, str(HERE / "plan_side.py"), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    return found


def compare(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(CASES[name], folder)
        told, seen = predicted(CASES[name], folder), measured(CASES[name], folder)
    ratios = {
        part: round(told["parts"][part] / size, 3) for part, size in seen["parts"].items() if part in told["parts"]
    }
    return {
        "case": name,
        "ratio": round(told["peak"] / seen["peak"], 3),
        "predicted_mib": round(told["peak"] / 2**20, 1),
        "measured_mib": round(seen["peak"] / 2**20, 1),
        "held_ratio": round(told["held"] / seen["held"], 3),
        "part_ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing is recorded")
    given = parser.parse_args()
    rows = []
    for name in given.only:
        rows.append(compare(name))
        print(json.dumps(rows[-1]) if given.json else rows[-1], flush=True)
    if not given.json:
        record.write("plan", {"threads": 1, "dtype": "float32 unless said"}, rows)


if __name__ == "__main__":
    main()
