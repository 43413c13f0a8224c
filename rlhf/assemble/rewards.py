"""Recipe → sources of scores: what is trained on, and who judges held-out completions beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from rlhf.assemble import models
from rlhf.locate import named_code
from rlhf.recipe import Recipe
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import RewardModel, load_reward_model
from rlhf.runtime.distributed import Runtime


def reward_set(recipe: Recipe, runtime: Runtime, *, steps: int) -> RewardSet:
    """Every reward source with its weight."""
    settings = recipe.reward
    overlong = settings.overlong
    return RewardSet(
        models=[
            (
                reward_model(recipe, runtime, cast(str, entry.path), entry.microbatch_tokens, entry.placement),
                entry.weight,
            )
            for entry in settings.models
        ],
        functions=[reward_function(entry.call, entry.weight, steps=steps) for entry in settings.functions],
        combine=settings.combine,
        clip=settings.clip,
        overlong=None if overlong is None else (overlong.from_tokens, overlong.per_token),
        missing_eos_score=settings.missing_eos_score,
    )


def with_judges(recipe: Recipe, runtime: Runtime, trained: RewardSet, *, steps: int) -> RewardSet:
    """The same rewards, and the judges of section ``eval`` as sources of weight 0: logged on held-out rows only."""
    judges = [(reward_model(recipe, runtime, entry.path, entry.microbatch_tokens), 0.0) for entry in recipe.eval.models]
    functions = [reward_function(call, 0.0, steps=steps) for call in recipe.eval.functions]
    return replace(trained, models=[*trained.models, *judges], functions=[*trained.functions, *functions])


def reward_model(
    recipe: Recipe, runtime: Runtime, path: str, microbatch_tokens: int | None, placement: str = "auto"
) -> RewardModel:
    """One frozen reward model."""
    return load_reward_model(
        path,
        device=runtime.device,
        compute_dtype=models.compute_dtype(recipe),
        microbatch_tokens=microbatch_tokens or recipe.batch.microbatch_tokens,
        placement=models.placement(placement),
        collective=runtime,
    )


def reward_function(call: str, weight: float, *, steps: int) -> FunctionReward:
    """One function named in the recipe; ``steps``: the run's length, which it may be told."""
    function = named_code(call, "reward function")
    return FunctionReward(name=call.partition(":")[2], function=function, weight=weight, max_steps=steps)
