"""A run that cannot fit is refused before anything is loaded, where it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.scratch import build_config
from rlhf.programs import fits
from rlhf.recipe import Recipe
from tests.support import alone


def recipe(path: Path, check: str) -> Recipe:
    values: dict[str, Any] = {
        "objective": "sft",
        "run": {"name": "x", "memory_check": check},
        "policy": {"path": str(path)},
        "data": {"train": [{"path": "rows"}]},
    }
    return Recipe.model_validate(values)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_config("gemma", layers=2, hidden_size=64, heads=4, vocab_size=300).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = psutil.virtual_memory()._replace(total=2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)


def test_a_run_that_cannot_fit_is_refused_where_it_is_asked_for(model: Path, no_memory: None) -> None:
    with pytest.raises(UserError, match=r"cannot fit: update would hold .* run.memory_check=never"):
        fits.refuse_what_cannot_fit(recipe(model, "always"), alone(), print)


@pytest.mark.parametrize("check", ["auto", "never"])
def test_a_cpu_is_not_asked_unless_the_user_does(check: str, model: Path, no_memory: None) -> None:
    fits.refuse_what_cannot_fit(recipe(model, check), alone(), print)


def test_a_model_of_unknown_size_is_told_and_not_refused(tmp_path: Path, no_memory: None) -> None:
    said: list[str] = []
    fits.refuse_what_cannot_fit(recipe(tmp_path / "nothing", "always"), alone(), said.append)
    assert len(said) == 1 and said[0].startswith("memory is not checked: policy.path=")


def test_a_run_that_fits_says_nothing(model: Path) -> None:
    said: list[str] = []
    fits.refuse_what_cannot_fit(recipe(model, "always"), alone(), said.append)
    assert said == []


def test_the_placement_is_that_of_the_process_group() -> None:
    runtime = replace(alone(), kind="ddp", world_size=4, device=torch.device("cpu"))
    found = fits.placement_of(runtime)
    assert (found.kind, found.processes, found.cpu) == ("ddp", 4, True)
