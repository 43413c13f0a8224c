"""A reward model on the policy's base: two ranks under DDP and ZeRO-2 end where one process ends with it whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import start
from .start import apart
from .test_objectives import LORA, RECIPE

JUDGE = "reward.models.0.path=runs/judge-reward/final"
SHARED = "reward.models.0.placement=policy_base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA reward model on ``start/``, and a policy of one process that loads it whole."""
    place = tmp_path_factory.mktemp("policy-base")
    function = 'reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}'
    text = RECIPE.replace(function, "reward: {models: [{path: judge}], missing_eos_score: null}")
    start.write(place, text.replace("objective: ppo", "objective: rloo"))
    start.trained(place, "judge", "reward", "optim.lr=1e-2", "run.steps=4", *LORA)
    start.trained(place, "alone", "rloo", JUDGE, *LORA)
    return place


@pytest.mark.ranks
@pytest.mark.slow  # four starts of a program, two of them of several processes
@pytest.mark.parametrize("config", ["cpu_2ranks", "cpu_zero2"])
def test_ranks_that_share_their_base_end_where_one_process_ends(config: str, folder: Path) -> None:
    start.trained(folder, f"shared-{config}", "rloo", JUDGE, SHARED, *LORA, "--accelerate", config)
    alone, both = (start.weights(folder, name, "rloo") for name in ("alone", f"shared-{config}"))
    assert apart(alone, both) <= 1e-5
    rewards = [start.rewards(folder / "runs" / f"{name}-rloo") for name in ("alone", f"shared-{config}")]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5) and rewards[0]


@pytest.mark.ranks
@pytest.mark.slow  # as above
def test_shares_of_a_base_are_refused(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"reward\.models\.0\.placement=policy_base: under ZeRO-3"):
        start.trained(folder, "refused", "rloo", JUDGE, SHARED, *LORA, "--accelerate", "cpu_zero3")
