"""Weights gathered a layer at a time while decoding: the completions of whole ones, and nobody waits for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import start


@pytest.mark.ranks
@pytest.mark.slow  # one forward for all processes at every token: a minute
@pytest.mark.parametrize("config", ["cpu_zero3", "cpu_fsdp2"])
def test_layers_decode_what_whole_weights_do(config: str, tmp_path: Path) -> None:
    """Rank 0 has one prompt, then none; rank 1 has six, then two, and rows that wait for a free place in the cache."""
    start.write(tmp_path, "")
    command = start.launched(start.CONFIGS / f"{config}.yaml")
    start.run(start.ROOT, [*command, "-m", "tests.ranks.gather_worker", str(tmp_path)])
    ranks = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    for rank in ranks:
        assert all(all(part["same"]) for part in rank)
        assert all(part["whole at once"] == min(1, len(part["lengths"])) for part in rank)
    few, many = ranks
    assert [len(part["lengths"]) for part in few] == [2, 2, 0, 0]
    assert [len(part["lengths"]) for part in many] == [12, 12, 4, 4]
    assert len(set(many[0]["lengths"])) > 3  # they do end at different times
