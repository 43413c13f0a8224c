"""Time and memory of a step as the batch grows at a fixed token budget, and as prompts and groups do.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py             10 minutes, 1 thread

A tiny Gemma (hidden 64, 4 layers, vocabulary 4,096), a reward model of the same size, 24 prompt tokens, 48 new tokens,
k = 4, forwards of 4,096 tokens, keys and values of 64 rows at once; then prompts of up to 512 tokens, then k up to 32,
at 64 completions. Medians over steps; bytes of tensors beyond what is held between steps.

Writes results/scaling.json, with R² of a straight line through the times of the growing batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import record
from compare_trl import Side
from trl_workloads import Workload, make

SMALL: dict[str, Any] = {
    "hidden": 64,
    "layers": 4,
    "reward_hidden": 64,
    "reward_layers": 4,
    "microbatch_tokens": 4096,
    "kv_cache_gib": 64 * (24 * 1.5 + 48) * 2 * 4 * 16 * 4 / 2**30,  # rows × tokens × (K, V) × layers × width × fp32
}
BATCHES = (64, 256, 1024, 4096)


def sweeps() -> dict[str, list[Workload]]:
    return {
        "batch": [Workload(name=f"{size} completions", prompts=size // 4, **SMALL) for size in BATCHES],
        "prompt": [Workload(name=f"prompt {n}", prompt_tokens=n, **SMALL) for n in (24, 128, 256, 512)],
        "k": [Workload(name=f"k = {k}", prompts=64 // k, k=k, prompt_tokens=256, **SMALL) for k in (1, 4, 8, 32)],
    }


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make(work, Path(folder), steps=rounds + 2)
        side = Side.start("ours", Path(folder))
        side.say("step")  # warms up
        steps = [side.say("step") for _ in range(rounds)]
        peak = side.say("memory")["peak_bytes"]
        side.end()
    phases = {name: round(statistics.median(step["phases"][name] for step in steps), 3) for name in steps[0]["phases"]}
    seconds = round(statistics.median(step["seconds"] for step in steps), 3)
    return {**asdict(work), "seconds": seconds, "phases": phases, "peak_mib": round(peak / 2**20, 1)}


def straightness(rows: list[dict[str, Any]]) -> float:
    """R² of seconds against completions."""
    x, y = (np.array(values, dtype=float) for values in (BATCHES, [row["seconds"] for row in rows]))
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    found: dict[str, list[dict[str, Any]]] = {}
    for sweep, works in sweeps().items():
        found[sweep] = []
        for work in works:
            row = measure(work, rounds)
            found[sweep].append(row)
            print(f"{work.name:20s} {row['seconds']:8.2f} s {row['peak_mib']:8.1f} MiB  {row['phases']}", flush=True)
    growth = found["batch"][-1]["peak_mib"] / found["batch"][0]["peak_mib"] - 1
    summary = {"r_squared": round(straightness(found["batch"]), 5), "peak_growth": round(growth, 3)}
    print(summary)
    record.write(
        "scaling", {"threads": 1, "rounds": rounds, **summary}, [row for rows in found.values() for row in rows]
    )


if __name__ == "__main__":
    main()
