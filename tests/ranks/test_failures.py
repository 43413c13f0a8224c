"""What ends one process ends the job, in seconds and with its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import start
from .test_objectives import RECIPE

ROOT = Path(__file__).parents[2]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("refuses", 2, "rank 1: reward function refuses returned 3 scores for 4 completions"),
        pytest.param("breaks", 1, "", marks=pytest.mark.slow),  # killed outright: nobody is left to say why
    ],
)
def test_the_job_ends_with_the_process(how: str, code: int, told: str, tmp_path: Path) -> None:
    start.write(tmp_path, RECIPE.replace("rlhf.data.quickstart:gold", f"tests.ranks.failing:{how}"))
    command = [sys.executable, "-m", "rlhf", "train", "recipe.yaml", "objective=rloo", "--accelerate", "cpu_2ranks"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    ended = time.time()
    run = tmp_path / "runs" / "one-rloo"
    assert done.returncode == code, done.stderr[-4000:]
    assert ended - (run / "metrics.jsonl").stat().st_mtime < 30  # the first step's line; a hang would be the timeout
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert told in done.stderr and record["exit_reason"].startswith(told)
    assert (record["status"], record["exit_code"]) == ("failed", code)
