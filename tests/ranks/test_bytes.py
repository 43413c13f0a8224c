"""Under ZeRO-3 and FSDP2 each of two ranks holds half of everything, the reward model included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import start


@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything, to count
@pytest.mark.parametrize("config", ["cpu_zero3", "cpu_fsdp2"])
def test_each_rank_holds_half(config: str, tmp_path: Path) -> None:
    """Counted on the shards themselves; all are float32, so elements stand for bytes. 5 %: shares are padded."""
    out = tmp_path / "facts.json"
    command = start.launched(start.CONFIGS / f"{config}.yaml")
    start.run(start.ROOT, [*command, "-m", "tests.ranks.bytes_worker", str(out)])
    for rank in json.loads(out.read_text(encoding="utf-8")):
        held, whole = rank["held"], rank["whole"]
        for name in ("weights", "gradients", "fp32 weights"):
            assert held[name] == pytest.approx(whole["policy"] / 2, rel=0.05), name
        assert held["moments"] == pytest.approx(whole["policy"], rel=0.05)
        assert held["reward model"] == pytest.approx(whole["reward model"] / 2, rel=0.05)
