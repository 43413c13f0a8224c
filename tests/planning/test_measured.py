"""Predicted peaks against the bytes of real steps (benchmarks/plan.py), within 15 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 0.15
QUICK = ("lora",)  # half a minute each
SLOW = (
    "recompute",
    "qlora",
    "8-bit reward model",
    "reinforce",
    "large reward model",
    "one forward",
    "ppo",
    "exact KL",
    "gemma 2",
    "gemma 3",
    "gemma 4",
    "32k vocabulary",
    "plain rows",
    "bf16",
)


def ratio(case: str) -> float:
    """Predicted / measured peak of one process."""
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--json", "--only", case]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["held_ratio"] - 1) <= 0.05, found
    return float(found["ratio"])


@pytest.mark.parametrize("case", QUICK)
def test_the_peak_is_predicted(case: str) -> None:
    assert ratio(case) == pytest.approx(1, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_the_peak_is_predicted_elsewhere(case: str) -> None:
    assert ratio(case) == pytest.approx(1, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("case", ["zero 2", "zero 3"])
def test_the_peak_of_a_shard_is_predicted(case: str) -> None:
    assert ratio(case) == pytest.approx(1, abs=WITHIN)


def test_recorded_ratios_are_those_that_the_page_shows() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for row in recorded["rows"]:
        assert (
            f"| {row['case']} | {row['predicted_mib']:,.1f} | {row['measured_mib']:,.1f} | {row['ratio']:.2f} |" in page
        )
