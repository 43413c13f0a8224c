"""Remarks on a valid recipe: what its author may want to know before it runs. They stop nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from rlhf.objectives.presets import OBJECTIVES
from rlhf.recipe.reading import family, on_policy, reads, reward_sources
from rlhf.recipe.schema import Recipe
from rlhf.recipe.servers import unencrypted

_REMARKS: list[Callable[[Recipe], Iterator[str]]] = []
_SEQUENCE_BASELINES = ("moving_average", "batch_mean", "greedy", "shrinkage", "optimal_token")


def remark(function: Callable[[Recipe], Iterator[str]]) -> Callable[[Recipe], Iterator[str]]:
    _REMARKS.append(function)
    return function


def remarks(recipe: Recipe) -> list[str]:
    """What a valid recipe's author may want to know before it runs."""
    return [text for function in _REMARKS for text in function(recipe)]


@remark
def to_go_and_baselines(recipe: Recipe) -> Iterator[str]:
    if not family(recipe) or recipe.kl.beta == 0:
        return
    if recipe.kl.estimator == "exact" and "credit" in recipe.kl.model_fields_set:
        yield "kl.credit is not read with kl.estimator: exact, which credits every position by itself"
    elif recipe.kl.credit == "to_go" and recipe.reinforce.baseline in _SEQUENCE_BASELINES:
        yield (
            f"under kl.credit: to_go, reinforce.baseline {recipe.reinforce.baseline} acts on scores; the KL part has "
            "its own leave-one-out per position"
        )


@remark
def known_distortions(recipe: Recipe) -> Iterator[str]:
    chosen = OBJECTIVES.get(recipe.objective)
    if chosen is not None and chosen.bias:
        yield f"{recipe.objective} is biased: {chosen.bias}"


@remark
def settings_without_effect(recipe: Recipe) -> Iterator[str]:
    optim = [f"optim.{name}" for name in ("lr", "schedule", "warmup_ratio", "max_grad_norm", "eps")]
    given = [key for key in optim if key.partition(".")[2] in recipe.optim.model_fields_set]
    if recipe.objective == "trpo" and given:
        yield f"trpo does not read {', '.join(given)}: trpo.max_kl decides how far a step goes"
    if reads(recipe, "ppo") and recipe.objective in OBJECTIVES and recipe.ppo.stop_kl and recipe.ppo.epochs == 1:
        yield "ppo.stop_kl ends the passes over a rollout, and there is one: it has no effect"


@remark
def one_kind_of_kl(recipe: Recipe) -> Iterator[str]:
    """Objectives outside the REINFORCE family know the sampled KL alone; their recipe may have been made for it."""
    if not on_policy(recipe) or family(recipe) or recipe.objective not in OBJECTIVES:
        return
    unread = [name for name, unset in (("estimator", "k1"), ("loss_beta", 0.0)) if getattr(recipe.kl, name) != unset]
    if unread:
        yield f"{recipe.objective} does not read {', '.join(f'kl.{name}' for name in unread)}"


@remark
def a_rounded_reference(recipe: Recipe) -> Iterator[str]:
    if reads(recipe, "reference") and recipe.reference.quantize is not None:
        yield "reference.quantize: the reference is a rounded model, so that kl/reference does not begin at 0"


@remark
def one_model_is_no_ensemble(recipe: Recipe) -> Iterator[str]:
    if reads(recipe, "reward") and recipe.reward.combine != "mean" and len(recipe.reward.models) == 1:
        yield f"reward.combine: {recipe.reward.combine} of a single model is that model"


@remark
def rewards_come_over_a_network(recipe: Recipe) -> Iterator[str]:
    for here, source in reward_sources(recipe):
        key = ".".join(map(str, here))
        for address in unencrypted(source.url or ""):
            yield f"{key}.url: {address} is plain http over a network, where texts and the token can be read"


@remark
def the_policy_goes_over_a_network(recipe: Recipe) -> Iterator[str]:
    if on_policy(recipe):
        for address in unencrypted(recipe.rollout.url or ""):
            yield f"rollout.url: {address} is plain http over a network, and whoever reaches it can replace the weights"


@remark
def nothing_holds_the_policy(recipe: Recipe) -> Iterator[str]:
    if on_policy(recipe) and recipe.kl.beta == 0 and recipe.kl.loss_beta == 0:
        yield "kl.beta is 0: nothing holds the policy near the reference; kl/reference is still measured"


@remark
def optimal_token_pays_late(recipe: Recipe) -> Iterator[str]:
    late = family(recipe) and recipe.reinforce.baseline == "optimal_token"
    if late and recipe.rollout.samples_per_prompt < 16:
        yield "reinforce.baseline: optimal_token loses to leave_one_out below about 16 samples per prompt"


@remark
def unused_rows(recipe: Recipe) -> Iterator[str]:
    if reads(recipe, "instruction") and recipe.data.instruction and recipe.instruction.coefficient == 0:
        yield "data.instruction is not read while instruction.coefficient is 0"


@remark
def held_out_rows(recipe: Recipe) -> Iterator[str]:
    if not recipe.data.eval:
        yield "data.eval is empty: nothing is measured on held-out rows"
    train = {(source.path, source.split) for source in recipe.data.train if source.max_rows is None}
    for index, source in enumerate(recipe.data.eval):
        if (source.path, source.split) in train:
            yield f"data.eval.{index} is also a training source: its figures are not held out"


@remark
def never_within_the_run(recipe: Recipe) -> Iterator[str]:
    steps = recipe.run.steps
    for section in ("eval", "checkpoint"):
        every = getattr(recipe, section).every_steps
        if steps is not None and every is not None and every > steps:
            yield f"{section}.every_steps is {every} and the run has {steps} steps: only the end counts"


@remark
def tempered_policy(recipe: Recipe) -> Iterator[str]:
    if on_policy(recipe) and recipe.rollout.temperature != 1:
        yield f"rollout.temperature {recipe.rollout.temperature}: KL and metrics are of the tempered policy"


@remark
def random_start(recipe: Recipe) -> Iterator[str]:
    if on_policy(recipe) and recipe.policy.scratch is not None:
        yield "policy.scratch: the policy and its reference start from random weights"


@remark
def trackers_that_are_not_installed(recipe: Recipe) -> Iterator[str]:
    for name in recipe.tracking.to:
        if find_spec(name) is None:
            yield f"tracking.to names {name}, which is not installed: pip install {name}; the run goes on without it"
