"""``best/``: replaced only by something better, and found again after a restart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf.programs.keeper import RECORD, Keeper, write_record


def keeper(folder: Path, metric: str, kept: list[int]) -> Keeper:
    def export(record: Mapping[str, float | int | str]) -> None:
        folder.mkdir(exist_ok=True)
        write_record(folder, record)
        kept.append(int(record["step"]))

    return Keeper(metric, folder, export)


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("eval/gold_mean", [1.0, 3.0, 2.0, 3.0, 4.0], [0, 1, 4]),  # a tie keeps the earlier one
        ("eval/loss", [2.0, 1.0, 1.5, 0.5], [0, 1, 3]),
        ("eval/kl_reference", [0.0, 1.0], [0]),
        ("eval/accuracy", [float("nan"), 0.5], [1]),
    ],
)
def test_only_something_better_is_kept(tmp_path: Path, metric: str, values: list[float], kept: list[int]) -> None:
    seen: list[int] = []
    best = keeper(tmp_path / "best", metric, seen)
    for step, value in enumerate(values):
        best.see(step, {metric: value, "eval/other": -value})
    assert seen == kept
    assert json.loads((tmp_path / "best" / RECORD).read_text())["step"] == kept[-1]


def test_a_restart_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    seen: list[int] = []
    keeper(tmp_path / "best", "eval/gold_mean", seen).see(5, {"eval/gold_mean": 2.0})
    again = keeper(tmp_path / "best", "eval/gold_mean", seen)
    again.see(6, {"eval/gold_mean": 1.0})
    again.see(7, {"eval/reward_mean": 9.0})  # an evaluation without the metric
    assert seen == [5] and again.best() == 2.0
    keeper(tmp_path / "best", "eval/reward_mean", seen).see(8, {"eval/reward_mean": 0.0})
    assert seen == [5, 8]  # what another metric chose is no yardstick
