"""The real trainer on the enumerable task: from recipe to ``final/``, how far from the closed-form optimum is it?"""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.errors import ExitCode

from .trainer_task import RECIPE, distance_to_optimum, write_start


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int, *overrides: str) -> tuple[float, float]:
    """Mean KL(π‖π*) over the prompts in nats, before and after ``steps`` rollouts."""
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
    assert after < 0.6 * before


@pytest.mark.slow  # a quarter of an hour on two cores: three times 800 rollouts of 1,024 completions
def test_the_optimum_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over prompts and three starts. Here .0026, .0074 and .0133: what is left is a completion that the reference
    samples once in 200 and π* seven times as often. It begins like bad ones, so it may be given up before it has been
    seen often enough, and what is never sampled is never learned. Which one goes hangs on rounding: with half as many
    completions a step the same starts ended at .0043, .0082, .0117 and, the sums taken in another order, at .0049,
    .0162, .0117."""
    found = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.append(train(folder, monkeypatch, seed, 800, "batch.prompts_per_step=128")[1])
    assert sum(found) / 3 < 0.01
    assert max(found) < 0.02
