"""Under ZeRO-3 and FSDP2 each of two ranks holds half of everything, the reward model included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything, to count
@pytest.mark.parametrize("config", ["cpu_zero3", "cpu_fsdp2"])
def test_each_rank_holds_half(config: str, tmp_path: Path) -> None:
    """Counted on the shards themselves; all are float32, so elements stand for bytes. 5 %: shares are padded."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launcher, str(ROOT / "accelerate_configs" / f"{config}.yaml"), "-m", "tests.ranks.bytes_worker"]
    out = tmp_path / "facts.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in json.loads(out.read_text(encoding="utf-8")):
        held, whole = rank["held"], rank["whole"]
        for name in ("weights", "gradients", "fp32 weights"):
            assert held[name] == pytest.approx(whole["policy"] / 2, rel=0.05), name
        assert held["moments"] == pytest.approx(whole["policy"], rel=0.05)
        assert held["reward model"] == pytest.approx(whole["reward model"] / 2, rel=0.05)
