"""A REINFORCE step of ours against one of TRL's RLOOTrainer: same weights, prompts, reward model, tokens; turn by turn.

    OMP_NUM_THREADS=1 python benchmarks/compare_trl.py                    40 minutes, 1 thread
    OMP_NUM_THREADS=1 python benchmarks/compare_trl.py --only W1 --rounds 2

Each side is a process of its own (trl_sides.py) on models with random weights (trl_workloads.py); they step in turn,
and whoever goes first changes from round to round. Both draw the same tokens, but for draws that rounding decides; the
script says how many completions are the same, and exits with 1 where the tokens of a step differ by a hundredth. Ratios
TRL / ours are medians over rounds of the ratio within a round. After the rounds one step each is watched for memory
(bytes of tensors beyond what is held between steps) and one for floating-point operations of matrix products. The floor
is what ours would take at this core's fastest product.

Writes results/compare_trl.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import record
import torch
from trl_workloads import WORKLOADS, Workload, make

HERE = Path(__file__).parent
SIDES = ("ours", "trl")


@dataclass(frozen=True)
class Side:
    """A process that steps when told to."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, side: str, folder: Path) -> Side:
        places = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "trl_sides.py"), side, str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with (folder / f"{side}.log").open("w") as log:
            return cls(subprocess.Popen(command, stderr=log, env=environment, **pipes))

    def say(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended; its log lies beside the models")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(answer)
        return found

    def end(self) -> None:
        self.process.communicate()


def measure(work: Workload, folder: Path, rounds: int) -> dict[str, Any]:
    sizes = make(work, folder, steps=rounds + 4)
    sides = {name: Side.start(name, folder) for name in SIDES}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for turn in range(rounds + 1):  # the first warms up
        for name in SIDES if turn % 2 else reversed(SIDES):
            steps[name].append(sides[name].say("step"))
    watched = {name: {**side.say("memory"), "flops": side.say("flops")["flops"]} for name, side in sides.items()}
    for side in sides.values():
        side.end()
    return {**asdict(work), **{f"{name}_parameters": n for name, n in sizes.items()}, **told(steps, watched)}


def told(steps: dict[str, list[dict[str, Any]]], watched: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(steps["ours"][1:], steps["trl"][1:], strict=True))
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    rows = [a == b for ours, theirs in pairs for a, b in zip(ours["rows"], theirs["rows"], strict=True)]
    found: dict[str, Any] = {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2),
        "tokens": [[side["tokens"] for side in pair] for pair in pairs],
        "equal_rows": round(sum(rows) / len(rows), 4),
        "memory_ratio": round(watched["trl"]["peak_bytes"] / watched["ours"]["peak_bytes"], 2),
    }
    for name in SIDES:
        phases = {
            phase: [step["phases"].get(phase, 0.0) for step in steps[name][1:]] for phase in steps[name][1]["phases"]
        }
        middle = {phase: round(statistics.median(values), 3) for phase, values in phases.items() if phase != "step"}
        seconds = statistics.median(step["seconds"] for step in steps[name][1:])
        rest = seconds - sum(middle.values())
        found[name] = {
            "seconds": round(seconds, 3),
            "phases": {**middle, "update" if name == "trl" else "rest": round(rest, 3)},
            "peak_mib": round(watched[name]["peak_bytes"] / 2**20, 1),
            "gflop": round(watched[name]["flops"] / 1e9, 2),
        }
    return found


def fastest_product(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a 512 × 512 product, the best of many."""
    left, right = torch.randn(512, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
    best = 0.0
    for _ in range(60):
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 512**3 / (time.perf_counter() - started))
    return best


def show(row: dict[str, Any]) -> None:
    ours, trl = row["ours"], row["trl"]
    ratio = f"{row['ratio']:5.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    times = f"{ours['seconds']:8.2f} s {trl['seconds']:8.2f} s"
    memory = f"{ours['peak_mib']:8.0f} {trl['peak_mib']:8.0f} MiB"
    work = f"{ours['gflop']:7.1f} {trl['gflop']:7.1f} GFLOP   floor {row['floor_seconds']:6.2f} s"
    print(f"{row['name']:24s}{times}   TRL / ours {ratio}   {memory}   {work}", flush=True)
    for side in SIDES:
        print(
            f"    {side:5s}" + "  ".join(f"{name} {value:.2f}" for name, value in row[side]["phases"].items()),
            flush=True,
        )
    if row["equal_rows"] < 1:
        print(f"    {row['equal_rows']:.2%} of the completions are the same on both sides", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[name.split()[0] for name in WORKLOADS], help="W1, W2, …")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    speed = fastest_product(getattr(torch, given.dtype))
    rows = []
    for name, work in WORKLOADS.items():
        if name.split()[0] in given.only:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(replace(work, dtype=given.dtype), Path(folder), given.rounds)
            rows.append({**row, "floor_seconds": round(row["ours"]["gflop"] * 1e9 / speed, 2)})
            show(rows[-1])
    suffix = "" if given.dtype == "float32" else f"_{given.dtype}"
    settings = {"rounds": given.rounds, "threads": 1, "fastest_product_gflops": round(speed / 1e9, 1)}
    record.write(f"compare_trl{suffix}", settings, rows)
    differing = [row["name"] for row in rows if any(abs(a - b) > b / 100 for a, b in row["tokens"])]
    if differing:
        raise SystemExit(f"other numbers of tokens: {', '.join(differing)}")


if __name__ == "__main__":
    main()
