"""Frozen models in shares: what a step scores and takes is what one process scores and takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.models.load import load_tokenizer
from rlhf.models.scratch import build_config, build_reward_model

from . import start
from .start import apart, trained
from .test_objectives import RECIPE

SHARES = ("reference.placement=zero3", "reward.models.0.placement=zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose reward is a model, larger than the policy."""
    place = tmp_path_factory.mktemp("placement")
    function = 'functions: [{call: "rlhf.data.quickstart:gold"}]'
    start.write(place, RECIPE.replace(function, "models: [{path: judge}]").replace("objective: ppo", "objective: rloo"))
    tokenizer = load_tokenizer(str(place / "start"))
    config = build_config("gemma", layers=2, hidden_size=64, heads=2, vocab_size=len(tokenizer))
    build_reward_model(config, seed=5).save_pretrained(place / "judge")
    tokenizer.save_pretrained(place / "judge")
    return place


@pytest.mark.ranks
@pytest.mark.parametrize(
    "config", ["cpu_zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu_2ranks", "cpu_fsdp2"))]
)  # the others: the same
def test_models_in_shares_score_as_whole_ones(config: str, folder: Path) -> None:
    alone = trained(folder, "alone", "rloo")
    both = trained(folder, f"shares-{config}", "rloo", *SHARES, "--accelerate", config)
    assert apart(alone, both) <= 1e-5
    rewards = [start.rewards(folder / "runs" / f"{name}-rloo") for name in ("alone", f"shares-{config}")]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
