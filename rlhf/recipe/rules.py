"""Rules between keys, each with its reason; what a recipe sets and nothing reads; remarks that stop nobody.

A rule looks only at what the objective reads: sections of other objectives may hold anything the schema allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf.objectives.presets import NOT_IN_THIS_VERSION, OBJECTIVES, is_dotted, preset
from rlhf.recipe.marks import Problem
from rlhf.recipe.schema import Policy, Recipe
from rlhf.recipe.validate import Rule
from rlhf.recipe.wording import near, shown

RULES: list[Rule] = []
_REMARKS: list[Callable[[Recipe], Iterator[str]]] = []

_GROUP_BASELINES = ("leave_one_out", "shrinkage", "optimal_token")
_SEQUENCE_BASELINES = ("moving_average", "batch_mean", "greedy", "shrinkage", "optimal_token")


def rule(function: Callable[[Recipe], Iterator[Problem]]) -> Callable[[Recipe], Iterator[Problem]]:
    RULES.append(function)
    return function


def remark(function: Callable[[Recipe], Iterator[str]]) -> Callable[[Recipe], Iterator[str]]:
    _REMARKS.append(function)
    return function


def remarks(recipe: Recipe) -> list[str]:
    """What a valid recipe's author may want to know before it runs."""
    return [text for function in _REMARKS for text in function(recipe)]


def ignored_sections(recipe: Recipe) -> list[str]:
    """Sections that the recipe sets and its objective does not read, in the order of the schema."""
    return [name for name in type(recipe).model_fields if name in recipe.model_fields_set and not reads(recipe, name)]


def reads(recipe: Recipe, section: str) -> bool:
    """Whether the objective reads this section. An unknown objective reads none, so that only its name is reported."""
    if section == "objective":
        return True
    if not is_dotted(recipe.objective) and recipe.objective not in OBJECTIVES:
        return False
    sections = preset(recipe.objective).sections
    return sections is None or section in sections


def on_policy(recipe: Recipe) -> bool:
    """Whether the objective belongs to the loop that samples from the policy."""
    return reads(recipe, "rollout")


# The objective and the run


@rule
def objective_is_known(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.objective
    if name in OBJECTIVES or is_dotted(name):
        return
    known = f"{' | '.join(OBJECTIVES)}, or your own as package.module:Class"
    if name in NOT_IN_THIS_VERSION:
        yield Problem(("objective",), f"{name} is not in this version; use {known}")
        return
    close = near(name, OBJECTIVES, cutoff=0.5)
    hint = f"did you mean {close}? " if close else ""
    yield Problem(("objective",), f"unknown objective {shown(name)}; {hint}Known: {known}")


@rule
def name_is_no_folder_reference(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.run.name.strip("."):
        yield Problem(("run", "name"), f"{shown(recipe.run.name)} means a folder, not a name; use letters or digits")


@rule
def policy_runs_count_steps(recipe: Recipe) -> Iterator[Problem]:
    if on_policy(recipe) and recipe.run.steps is None:
        yield Problem(
            ("run", "steps"), f"{recipe.objective} has no epochs to derive it from; set the number of rollouts"
        )


# The models


@rule
def policy_is_loaded_or_made(recipe: Recipe) -> Iterator[Problem]:
    path, scratch = recipe.policy.path, recipe.policy.scratch
    if (path is None) == (scratch is None):
        what = "neither policy.path nor policy.scratch is" if path is None else "both policy.path and policy.scratch are"
        yield Problem(
            ("policy",), f"{what} set; give `path: <hub id or folder>` to load a model, or `scratch:` to make one"
        )


@rule
def tokenizer_belongs_to_scratch(recipe: Recipe) -> Iterator[Problem]:
    if recipe.policy.tokenizer is not None and recipe.policy.scratch is None:
        yield Problem(
            ("policy", "tokenizer"), "only for policy.scratch: a loaded model's embeddings fit its own tokenizer alone"
        )


@rule
def heads_divide_width(recipe: Recipe) -> Iterator[Problem]:
    scratch = recipe.policy.scratch
    if scratch is not None and scratch.hidden_size % (2 * scratch.heads):
        yield Problem(
            ("policy", "scratch", "hidden_size"),
            f"{scratch.hidden_size} does not split into {scratch.heads} heads of even width (rotary positions pair "
            f"up dimensions); use a multiple of {2 * scratch.heads}",
        )


@rule
def adapters_need_a_base(recipe: Recipe) -> Iterator[Problem]:
    if recipe.policy.lora is not None and recipe.policy.scratch is not None:
        yield Problem(("policy", "lora"), "adapters on random frozen weights learn next to nothing; remove it")


@rule
def reference_can_be_placed(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "reference"):
        return
    if recipe.reference.ema > 0:
        yield Problem(("reference", "ema"), "a moving reference is not in this version; set 0.0")
    if recipe.reference.placement not in ("auto", "replicate"):
        yield Problem(("reference", "placement"), f"{recipe.reference.placement} is not in this version; set auto")


# The reward


@rule
def reinforce_has_something_to_maximise(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective != "reinforce":
        return
    sources = (*recipe.reward.models, *recipe.reward.functions)
    if not any(source.weight != 0 for source in sources):
        what = "every source has weight 0 and is only logged" if sources else "there is no reward"
        yield Problem(
            ("reward",), f"{what}; reinforce needs reward.models or reward.functions with an entry of weight ≠ 0"
        )


@rule
def reward_models_are_reachable(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "reward"):
        return
    for index, model in enumerate(recipe.reward.models):
        here = ("reward", "models", index)
        if (model.path is None) == (model.url is None):
            what = "neither path nor url" if model.path is None else "both path and url"
            yield Problem(here, f"{what} given; a reward model is a folder or hub id (`path:`)")
        elif model.url is not None:
            yield Problem((*here, "url"), "reward servers are not in this version; use path")
        elif model.token_env is not None:
            yield Problem((*here, "token_env"), "only a server asks for a token; remove it")
        if model.placement not in ("auto", "replicate"):
            yield Problem((*here, "placement"), f"{model.placement} is not in this version; set auto")


@rule
def reward_weights_have_a_mean(recipe: Recipe) -> Iterator[Problem]:
    weights = [model.weight for model in recipe.reward.models]
    if reads(recipe, "reward") and recipe.reward.combine == "mean" and any(weights) and sum(weights) == 0:
        yield Problem(("reward", "models"), "the weights add up to 0, and the weighted mean divides by their sum")


# The algorithm


@rule
def group_baselines_need_a_group(recipe: Recipe) -> Iterator[Problem]:
    baseline = recipe.reinforce.baseline
    if recipe.objective == "reinforce" and baseline in _GROUP_BASELINES and recipe.rollout.samples_per_prompt < 2:
        yield Problem(
            ("rollout", "samples_per_prompt"),
            f"1 leaves nothing to compare with: reinforce.baseline {baseline} is made of the prompt's other "
            "completions; set at least 2, or baseline moving_average",
        )


@rule
def batch_mean_needs_a_batch(recipe: Recipe) -> Iterator[Problem]:
    completions = recipe.batch.prompts_per_step * recipe.rollout.samples_per_prompt
    if recipe.objective == "reinforce" and recipe.reinforce.baseline == "batch_mean" and completions < 2:
        yield Problem(
            ("reinforce", "baseline"),
            "batch_mean of one completion is its own reward, so every advantage is 0; raise batch.prompts_per_step",
        )


@rule
def value_baseline_needs_a_value_model(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective == "reinforce" and recipe.reinforce.baseline == "value":
        yield Problem(
            ("reinforce", "baseline"), "value needs a value model, which is not in this version; use leave_one_out"
        )


@rule
def one_update_per_rollout(recipe: Recipe) -> Iterator[Problem]:
    updates = recipe.reinforce.updates_per_rollout
    if recipe.objective == "reinforce" and updates > 1:
        yield Problem(
            ("reinforce", "updates_per_rollout"),
            f"{updates} makes later updates off-policy, and the sequence importance weights that correct them are not "
            "in this version; set 1",
        )


@rule
def kl_coefficient_is_fixed(recipe: Recipe) -> Iterator[Problem]:
    if reads(recipe, "kl") and recipe.kl.target is not None:
        yield Problem(("kl", "target"), "adapting beta to a target is not in this version; set kl.beta instead")


@rule
def instruction_term_needs_rows(recipe: Recipe) -> Iterator[Problem]:
    if reads(recipe, "instruction") and recipe.instruction.coefficient > 0 and not recipe.data.instruction:
        yield Problem(
            ("instruction", "coefficient"), "its term is a likelihood of gold completions; add data.instruction"
        )


@rule
def completions_are_decoded_here(recipe: Recipe) -> Iterator[Problem]:
    if on_policy(recipe) and recipe.rollout.engine != "hf":
        yield Problem(("rollout", "engine"), f"{recipe.rollout.engine} is not in this version; set hf")


@rule
def rows_are_not_packed(recipe: Recipe) -> Iterator[Problem]:
    if recipe.objective == "sft" and recipe.sft.packing:
        yield Problem(("sft", "packing"), "not in this version; set false")


@rule
def nothing_is_pushed(recipe: Recipe) -> Iterator[Problem]:
    if recipe.checkpoint.hub_id is not None:
        yield Problem(
            ("checkpoint", "hub_id"), "pushing is not in this version; set null and upload `final/` when you are content"
        )


# The data


@rule
def there_are_rows(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.data.train:
        yield Problem(("data", "train"), "no rows to train on; add `- {path: …}`")


@rule
def prompts_are_cut_from_text_only(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.prompt_tokens is None:
        return
    for index, source in enumerate(recipe.data.train):
        if source.format not in ("auto", "text"):
            yield Problem(
                ("data", "prompt_tokens"),
                f"cuts prompts from plain text, and data.train.{index}.format is {shown(source.format)}, whose rows "
                "have prompts of their own; remove one of the two",
            )


# Remarks


@remark
def to_go_and_baselines(recipe: Recipe) -> Iterator[str]:
    if recipe.objective != "reinforce" or recipe.kl.beta == 0:
        return
    if recipe.kl.estimator == "exact" and "credit" in recipe.kl.model_fields_set:
        yield "kl.credit is not read with kl.estimator: exact, which credits every position by itself"
    elif recipe.kl.credit == "to_go" and recipe.reinforce.baseline in _SEQUENCE_BASELINES:
        yield (
            f"under kl.credit: to_go, reinforce.baseline {recipe.reinforce.baseline} acts on scores; the KL part has "
            "its own leave-one-out per position"
        )


@remark
def one_model_is_no_ensemble(recipe: Recipe) -> Iterator[str]:
    if reads(recipe, "reward") and recipe.reward.combine != "mean" and len(recipe.reward.models) == 1:
        yield f"reward.combine: {recipe.reward.combine} of a single model is that model"


@remark
def nothing_holds_the_policy(recipe: Recipe) -> Iterator[str]:
    if on_policy(recipe) and recipe.kl.beta == 0 and recipe.kl.loss_beta == 0:
        yield "kl.beta is 0: nothing holds the policy near the reference; kl/reference is still measured"


@remark
def optimal_token_pays_late(recipe: Recipe) -> Iterator[str]:
    if recipe.objective == "reinforce" and recipe.reinforce.baseline == "optimal_token":
        if recipe.rollout.samples_per_prompt < 16:
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
    policy: Policy = recipe.policy
    if on_policy(recipe) and policy.scratch is not None:
        yield "policy.scratch: the policy and its reference start from random weights"
