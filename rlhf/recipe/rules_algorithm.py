"""Rules between keys, each with its reason: baselines, critics, KL, steps.

A rule looks only at what the objective reads: sections of other objectives may hold anything the schema allows.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.objectives.presets import is_dotted
from rlhf.recipe.marks import Problem
from rlhf.recipe.reading import family, reads
from rlhf.recipe.schema import Recipe
from rlhf.recipe.validate import Rule, registrar

RULES: list[Rule] = []
rule = registrar(RULES)

_GROUP_BASELINES = ("group_mean", "leave_one_out", "shrinkage", "optimal_token")


@rule
def group_baselines_need_a_group(recipe: Recipe) -> Iterator[Problem]:
    baseline = recipe.reinforce.baseline
    if family(recipe) and baseline in _GROUP_BASELINES and recipe.rollout.samples_per_prompt < 2:
        yield Problem(
            ("rollout", "samples_per_prompt"),
            f"1 leaves nothing to compare with: reinforce.baseline {baseline} is made of the prompt's other "
            "completions; set at least 2, or baseline moving_average",
        )


@rule
def batch_mean_needs_a_batch(recipe: Recipe) -> Iterator[Problem]:
    completions = recipe.batch.prompts_per_step * recipe.rollout.samples_per_prompt
    if family(recipe) and recipe.reinforce.baseline == "batch_mean" and completions < 2:
        yield Problem(
            ("reinforce", "baseline"),
            "batch_mean of one completion is its own reward, so every advantage is 0; raise batch.prompts_per_step",
        )


@rule
def value_baseline_needs_a_value_model(recipe: Recipe) -> Iterator[Problem]:
    if family(recipe) and recipe.reinforce.baseline == "value":
        yield Problem(
            ("reinforce", "baseline"),
            f"value needs a critic, which {recipe.objective} has not: `objective: a2c` is REINFORCE with that baseline",
        )


@rule
def the_best_needs_rivals(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective == "raft" and recipe.rollout.samples_per_prompt < 2:
        yield Problem(("rollout", "samples_per_prompt"), "1 makes every completion the best; set at least 2")


@rule
def the_critic_can_be_made(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "value") or is_dotted(recipe.objective):
        return
    scratch, settings = recipe.policy.scratch, recipe.value
    here = bool(recipe.reward.models) and recipe.reward.models[0].path is not None
    of_policy = not settings.shared and (settings.init != "reward" or not here)
    if of_policy and scratch is not None and scratch.family == "gemma4":
        yield Problem(("policy", "scratch", "family"), "gemma4 has no class with a scalar head; use gemma3")
    if settings.shared and settings.warmup_steps:
        yield Problem(
            ("value", "warmup_steps"), "a shared critic's loss trains the policy's trunk from the second step; set 0"
        )
    if recipe.run.steps is not None and settings.warmup_steps >= recipe.run.steps:
        yield Problem(("value", "warmup_steps"), f"all {recipe.run.steps} steps: the policy would never be trained")
    if recipe.ppo.minibatches > recipe.batch.prompts_per_step:
        yield Problem(
            ("ppo", "minibatches"), f"{recipe.ppo.minibatches} parts of {recipe.batch.prompts_per_step} prompts"
        )


@rule
def pairs_come_from_somewhere(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective != "dpo":
        return
    settings = recipe.dpo
    if settings.online and recipe.rollout.samples_per_prompt < 2:
        yield Problem(("rollout", "samples_per_prompt"), "1 completion makes no pair, and dpo.online asks for pairs")
    if settings.online and recipe.rollout.temperature != 1:
        yield Problem(("rollout", "temperature"), "dpo compares log-probabilities at temperature 1; set 1.0")
    if (settings.beta or recipe.kl.beta) == 0:
        yield Problem(("dpo", "beta"), "null stands for kl.beta, which is 0: nothing would be learned; set one of them")
    if settings.loss == "robust" and settings.online and settings.labels == "soft":
        yield Problem(("dpo", "loss"), "robust corrects for labels that are flipped; soft labels are not; set sigmoid")


@rule
def one_spread_divides_all_tokens(recipe: Recipe) -> Iterator[Problem]:
    if family(recipe) and recipe.reinforce.baseline == "optimal_token" and recipe.reinforce.divide_by != "none":
        yield Problem(
            ("reinforce", "divide_by"), "optimal_token has another baseline at each token; set none, or leave_one_out"
        )


@rule
def kl_coefficient_is_fixed(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "kl") or recipe.kl.target is None or is_dotted(recipe.objective):
        return
    if not reads(recipe, "ppo"):
        yield Problem(
            ("kl", "target"), f"adapting beta to a target is ppo's; {recipe.objective} keeps kl.beta: set null"
        )
    elif recipe.kl.beta == 0:
        yield Problem(("kl", "beta"), "0 times anything stays 0: give kl.target a coefficient to start from")


@rule
def a_step_is_limited_once(recipe: Recipe) -> Iterator[Problem]:
    """And only where there is a policy whose distributions can be compared."""
    if recipe.optim.kl_step_limit is None:
        return
    if recipe.objective == "reward":
        yield Problem(("optim", "kl_step_limit"), "a reward model has no distribution over tokens; set null")
    if recipe.objective == "trpo":
        yield Problem(("optim", "kl_step_limit"), "trpo's steps are limited by trpo.max_kl; set null")


@rule
def natural_gradients_need_exact_arithmetic(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective == "trpo" and recipe.policy.compute_dtype == "bfloat16":
        yield Problem(
            ("policy", "compute_dtype"),
            "trpo takes differences of gradients, which bfloat16's 8 bits round away; set float32",
        )
    if recipe.objective == "trpo" and recipe.instruction.coefficient > 0:
        yield Problem(
            ("instruction", "coefficient"),
            "trpo measures its steps on the rollout, and this term steps in directions that the rollout does not see; "
            "set 0, or take reinforce with optim.kl_step_limit",
        )
    if recipe.objective == "trpo" and recipe.reinforce.updates_per_rollout > 1:
        yield Problem(("reinforce", "updates_per_rollout"), "trpo takes one step a rollout, as far as it may; set 1")


@rule
def instruction_term_needs_rows(recipe: Recipe) -> Iterator[Problem]:
    if reads(recipe, "instruction") and recipe.instruction.coefficient > 0 and not recipe.data.instruction:
        yield Problem(
            ("instruction", "coefficient"), "its term is a likelihood of gold completions; add data.instruction"
        )
