"""Recipe → sources of scores: what is trained on, and who judges held-out completions beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf.assemble import models
from rlhf.errors import UserError
from rlhf.interfaces import Reward
from rlhf.locate import named_code
from rlhf.models import adapters
from rlhf.recipe import Recipe
from rlhf.recipe.reading import reward_sources
from rlhf.recipe.sections import RewardModel, RewardSource
from rlhf.recipe.servers import addresses, token_of
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import load_reward_model
from rlhf.rewards.policy_base import reward_model_beside
from rlhf.runtime.distributed import Runtime

if TYPE_CHECKING:
    from rlhf.rewards.replicas import Replicas
    from rlhf.rewards.server import ServerReward

NO_SHARES = (
    "{key}.placement=policy_base: under ZeRO-3 and FSDP2 the policy's weights are in shares, which all processes "
    "gather at once, and they score different numbers of texts; launch DDP or ZeRO-2, or set placement=zero3"
)
Note = Callable[[str], None]
Base = Callable[[], nn.Module]


def refuse_other_bases(recipe: Recipe, runtime: Runtime) -> None:
    """Before anything is loaded: raises UserError where a reward model cannot lie on the policy's base."""
    for index, entry in enumerate(recipe.reward.models):
        if entry.placement != "policy_base":
            continue
        key = f"reward.models.{index}"
        if runtime.sharded:
            raise UserError(NO_SHARES.format(key=key))
        assert entry.path is not None and recipe.policy.path is not None
        adapters.refuse_another_base(entry.path, recipe.policy.path, f"{key}.path")


def reward_set(recipe: Recipe, runtime: Runtime, note: Note, *, steps: int, policy: Base | None = None) -> RewardSet:
    """Every reward source with its weight. policy: gives the one whose base reward models may lie on."""
    settings = recipe.reward
    overlong = settings.overlong
    return RewardSet(
        models=[
            (_trained_on(recipe, runtime, index, entry, note, policy), entry.weight)
            for index, entry in enumerate(settings.models)
        ],
        functions=[reward_function(entry.call, entry.weight, steps=steps) for entry in settings.functions],
        combine=settings.combine,
        clip=settings.clip,
        overlong=None if overlong is None else (overlong.from_tokens, overlong.per_token),
        missing_eos_score=settings.missing_eos_score,
    )


def with_judges(recipe: Recipe, runtime: Runtime, trained: RewardSet, note: Note, *, steps: int) -> RewardSet:
    """The same rewards, and the judges of section ``eval`` as sources of weight 0: logged on held-out rows only."""
    judges = [
        (reward_model(recipe, runtime, f"eval.models.{index}", entry, note), 0.0)
        for index, entry in enumerate(recipe.eval.models)
    ]
    functions = [reward_function(call, 0.0, steps=steps) for call in recipe.eval.functions]
    return replace(trained, models=[*trained.models, *judges], functions=[*trained.functions, *functions])


def _trained_on(
    recipe: Recipe, runtime: Runtime, index: int, entry: RewardModel, note: Note, policy: Base | None
) -> Reward:
    """A reward model of the reward; beside the policy where it is to lie on its base."""
    if entry.placement != "policy_base":
        return reward_model(recipe, runtime, f"reward.models.{index}", entry, note)
    assert entry.path is not None and policy is not None, "a rule of the recipe"
    return reward_model_beside(
        entry.path,
        policy().to(runtime.device),
        adapter=f"reward_{index}",
        compute_dtype=models.compute_dtype(recipe),
        microbatch_tokens=entry.microbatch_tokens or recipe.batch.microbatch_tokens,
    )


def reward_model(recipe: Recipe, runtime: Runtime, key: str, entry: RewardSource, note: Note) -> Reward:
    """One frozen reward model, on this device or behind a server. ``key``: the entry's place in the recipe."""
    if entry.path is None:
        return served(recipe, key, entry, note, runtime.gather_objects)
    return load_reward_model(
        entry.path,
        device=runtime.device,
        compute_dtype=models.compute_dtype(recipe),
        microbatch_tokens=entry.microbatch_tokens or recipe.batch.microbatch_tokens,
        placement=models.placement(getattr(entry, "placement", "auto")),
        collective=runtime,
        quantize=models.quantization(recipe, entry.quantize, runtime.device),
    )


def served(
    recipe: Recipe,
    key: str,
    entry: RewardSource,
    note: Note,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> ServerReward:
    """What the servers of an entry hold, and how they are asked. Raises UserError where they do not answer, and where
    they are to be sent ids that mean something else to them than to the policy."""
    from rlhf.rewards.server import connect  # an extra is needed for this

    found = connect(replicas_of(key, entry, note), gather)
    return found.with_ids(models.tokenizer_of(recipe)) if entry.send == "ids" else found


def replicas_of(key: str, entry: RewardSource, note: Note = lambda text: None) -> Replicas:
    """The servers that an entry names."""
    from rlhf.rewards.replicas import Replicas

    return Replicas(
        key=f"{key}.url",
        urls=tuple(addresses(entry.url or "")),
        token=None if entry.token_env is None else token_of(entry.token_env),
        give_up_seconds=entry.give_up_seconds,
        note=note,
    )


def served_identities(recipe: Recipe, note: Note) -> dict[str, str]:
    """Dotted key → identity of the model that every named server holds now: an input of the run like a folder is."""
    return {
        f"{'.'.join(map(str, here))}.url": served(recipe, ".".join(map(str, here)), entry, note).contract.identity
        for here, entry in reward_sources(recipe)
        if entry.url is not None
    }


def reward_function(call: str, weight: float, *, steps: int) -> FunctionReward:
    """One function named in the recipe; ``steps``: the run's length, which it may be told."""
    function = named_code(call, "reward function")
    return FunctionReward(name=call.partition(":")[2], function=function, weight=weight, max_steps=steps)
