"""The policy that every run starts from, and the recipe in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.errors import ExitCode
from tests.end_to_end.runs import RECIPE, SCRATCH


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``final/`` of one SFT step: the policy that every run below starts from."""
    folder = tmp_path_factory.mktemp("sft")
    text = RECIPE.replace("objective: reinforce", "objective: sft").replace("steps: 2", "steps: 1")
    text = text.replace('{path: "SFT", compute_dtype: float32}', SCRATCH)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    assert rlhf.train(str(folder / "recipe.yaml"), f"run.output_dir={folder}/run") == ExitCode.DONE
    return folder / "run" / "final"


@pytest.fixture
def recipe(sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file in a folder of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SFT", str(sft)), encoding="utf-8")
    return "recipe.yaml"
