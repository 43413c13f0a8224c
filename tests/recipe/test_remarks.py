"""What `rlhf check` says about a valid recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf.recipe import Recipe, ignored_sections, load_recipe, remarks
from tests.recipe.corpus import recipe

pytestmark = pytest.mark.usefixtures("place")


TEXT = recipe(
    data="data: {train: [{path: rows.jsonl}], eval: [{path: model}]}",
    eval="eval: {every_steps: 1}",
    checkpoint="checkpoint: {every_steps: 1}",
)


def load(*overrides: str) -> Recipe:
    """A recipe about which there is nothing to say, changed."""
    Path("r.yaml").write_text(TEXT)
    return load_recipe("r.yaml", overrides)


def test_nothing_to_say() -> None:
    assert remarks(load()) == [] and ignored_sections(load()) == []


def test_sections_that_the_objective_does_not_read() -> None:
    ready = load("objective=sft", "ppo.clip=0.1", "kl.beta=0.1", "sft.epochs=2")
    assert ignored_sections(ready) == ["reward", "kl", "ppo"]


def test_an_outside_objective_may_read_any_section() -> None:
    assert ignored_sections(load("objective=json:JSONDecoder", "ppo.clip=0.1")) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["kl.estimator=exact", "kl.credit=to_go"], "kl.credit is not read"),
        (["kl.credit=to_go", "reinforce.baseline=moving_average"], "moving_average acts on scores"),
        (["kl.beta=0"], "nothing holds the policy"),
        (["reward={combine: min, models: [{path: model}]}"], "of a single model is that model"),
        (["reference.quantize=8bit"], "the reference is a rounded model"),
        (["rollout.temperature=0.7"], "KL and metrics are of the tempered policy"),
        (["reinforce.baseline=optimal_token"], "below about 16 samples"),
        (["eval.every_steps=10"], "eval.every_steps is 10 and the run has 3 steps"),
        (["checkpoint.every_steps=10"], "checkpoint.every_steps is 10 and the run has 3 steps"),
        (["policy={scratch: {}}"], "start from random weights"),
        (["data.eval=[]"], "data.eval is empty"),
        (
            ["reward.models=[{url: 'http://127.0.0.1:1,http://10.0.0.1:1'}]"],
            "http://10.0.0.1:1 is plain http over a net",
        ),
        (
            ["rollout.engine=vllm", "rollout.url=http://10.0.0.1:8000"],
            "whoever reaches it can replace the weights",
        ),
        (["data.eval.0.path=rows.jsonl"], "data.eval.0 is also a training source"),
        (["data.instruction.0.path=rows.jsonl"], "not read while instruction.coefficient is 0"),
    ],
)
def test_a_remark(overrides: list[str], said: str) -> None:
    (found,) = remarks(load(*overrides))
    assert said in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["kl.credit=to_go"],
        ["kl.beta=0", "kl.loss_beta=0.1"],
        ["kl.estimator=exact"],
        ["reward.models=[{url: 'http://localhost:1,http://[::1]:1,https://10.0.0.1'}]"],
    ],
)
def test_no_remark(overrides: list[str]) -> None:
    assert remarks(load(*overrides)) == []


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = load("tracking.to=[wandb, trackio]")
    monkeypatch.setitem(sys.modules, "trackio", None)  # as where only the plain package is installed
    assert remarks(ready) == [
        "tracking.to names trackio, which is not installed: pip install trackio; the run goes on without it"
    ]
