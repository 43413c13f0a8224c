"""The real trainer on the enumerable task: from recipe to ``final/``, how far from the closed-form optimum is it?"""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.errors import ExitCode

from .trainer_task import RECIPE, distance_to_optimum, write_start


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int, *overrides: str) -> tuple[float, float]:
    """Mean KL(π‖π*) over the prompts in nats, before and after ``steps`` rollouts of 512 completions."""
    monkeypatch.chdir(folder)
    write_start(folder / "start", seed)
    (folder / "r.yaml").write_text(RECIPE.replace("SEED", str(seed)).replace("STEPS", str(steps)), encoding="utf-8")
    assert rlhf.train("r.yaml", *overrides) == ExitCode.DONE
    final = folder / "runs" / "task-reinforce" / "final"
    before = distance_to_optimum(folder / "start", folder / "start")
    return float(before.mean()), float(distance_to_optimum(final, folder / "start").mean())


def test_half_of_the_way_in_sixty_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = train(tmp_path, monkeypatch, 0, 60)
    assert before > 1
    assert after < 0.6 * before  # .82 of 1.70 nats here


@pytest.mark.slow  # a quarter of an hour a seed on two cores: 800 rollouts of 512 completions
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    _, after = train(tmp_path, monkeypatch, seed, 800)
    assert after < 0.01
