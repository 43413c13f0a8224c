"""Gemma 1, 2 and 3 through every placement: two processes end where one process ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from rlhf.models.load import load_tokenizer
from rlhf.models.scratch import build_causal_lm, build_config, build_reward_model

from . import start
from .test_objectives import RECIPE
from .test_placement import SHARES

FAMILIES = ("gemma", "gemma2", "gemma3")
PLACEMENTS: dict[str, tuple[str, tuple[str, ...]]] = {  # name → (accelerate config, settings)
    "ddp": ("cpu_2ranks", ()),
    "zero2-frozen-shares": ("cpu_zero2", SHARES),
    "zero3": ("cpu_zero3", ()),
    "zero3-by-layer": ("cpu_zero3", ("rollout.gather=layers", *SHARES)),
    "fsdp2": ("cpu_fsdp2", ()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and a reward model of two layers of each family, trained by one process."""
    place = tmp_path_factory.mktemp("families")
    function = 'functions: [{call: "rlhf.data.quickstart:gold"}]'
    start.write(place, RECIPE.replace(function, "models: [{path: judge}]"))
    tokenizer = load_tokenizer(str(place / "start"))
    for family in FAMILIES:
        config = build_config(family, layers=2, hidden_size=32, heads=2, vocab_size=len(tokenizer), sliding_window=4)
        build_causal_lm(config, seed=3).save_pretrained(place / family)
        build_reward_model(config, seed=5).save_pretrained(place / f"{family}-judge")
        for each in (family, f"{family}-judge"):
            tokenizer.save_pretrained(place / each)
    start.train_several(place, None, [run("alone", family) for family in FAMILIES])
    return place


@pytest.fixture(scope="module")
def placed(folder: Path) -> Callable[[str], Path]:
    """name of ``PLACEMENTS`` → the folder, in which two processes have trained every family so."""

    @cache
    def done(name: str) -> Path:
        config, settings = PLACEMENTS[name]
        runs = [(*run(name, family), *settings) for family in FAMILIES]
        start.train_several(folder, start.CONFIGS / f"{config}.yaml", runs)
        return folder

    return done


def run(name: str, family: str) -> tuple[str, ...]:
    models = (f"policy.path={family}", f"reward.models.0.path={family}-judge")
    return (f"run.name={name}-{family}", "objective=rloo", *models)


@pytest.mark.ranks
@pytest.mark.slow  # a quarter of a minute a placement
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_alike_wherever_its_models_lie(
    family: str, name: str, placed: Callable[[str], Path]
) -> None:
    folder = placed(name)
    alone, both = (start.weights(folder, f"{kind}-{family}", "rloo") for kind in ("alone", name))
    assert start.apart(alone, both) <= 1e-5
