"""Weights gathered a layer at a time while decoding: the completions of whole ones, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import start

ROOT = Path(__file__).parents[2]


@pytest.mark.ranks
@pytest.mark.slow  # one forward for all processes at every token: a minute
@pytest.mark.parametrize("config", ["cpu_zero3", "cpu_fsdp2"])
def test_layers_decode_what_whole_weights_do(config: str, tmp_path: Path) -> None:
    """Rank 0 has one prompt, then none; rank 1 has six, then two, and rows that wait for a free place in the cache."""
    start.write(tmp_path, "")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launcher, str(ROOT / "accelerate_configs" / f"{config}.yaml"), "-m", "tests.ranks.gather_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-9000:]
    ranks = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    for rank in ranks:
        assert all(all(part["same"]) for part in rank)
        assert all(part["whole at once"] == min(1, len(part["lengths"])) for part in rank)
    few, many = ranks
    assert [len(part["lengths"]) for part in few] == [2, 2, 0, 0]
    assert [len(part["lengths"]) for part in many] == [12, 12, 4, 4]
    assert len(set(many[0]["lengths"])) > 3  # they do end at different times
