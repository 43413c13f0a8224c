"""Rules between keys, each with its reason; and what a recipe sets that its objective does not read.

A rule looks only at what the objective reads: sections of other objectives may hold anything the schema allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import reduce
from importlib.util import find_spec

from rlhf.objectives.presets import NOT_IN_THIS_VERSION, OBJECTIVES, Program, is_dotted, preset
from rlhf.recipe.marks import KeyPath, Problem
from rlhf.recipe.schema import Recipe
from rlhf.recipe.sections import RewardModel, RewardSource
from rlhf.recipe.servers import wrong_addresses
from rlhf.recipe.validate import Rule
from rlhf.recipe.wording import near, shown

RULES: list[Rule] = []

# What an evaluation of each objective writes (docs/metrics.md), beside the scores of every source.
_EVALUATED = {
    "reinforce": ("eval/reward_mean", "eval/kl_reference", "eval/length_mean", "eval/eos_rate"),
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/margin", "eval/score_mean"),
}
_GROUP_BASELINES = ("group_mean", "leave_one_out", "shrinkage", "optimal_token")


def rule(function: Callable[[Recipe], Iterator[Problem]]) -> Callable[[Recipe], Iterator[Problem]]:
    RULES.append(function)
    return function


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


def family(recipe: Recipe) -> bool:
    """Whether the objective is `reinforce` or one of the presets made of it."""
    return recipe.objective in OBJECTIVES and reads(recipe, "reinforce")


def on_policy(recipe: Recipe) -> bool:
    """Whether the objective reads what the loop that samples from the policy does."""
    return reads(recipe, "rollout")


def reward_sources(recipe: Recipe) -> Iterator[tuple[KeyPath, RewardSource]]:
    """Key and entry of every reward model that the objective reads: those of the reward, and held-out judges."""
    if reads(recipe, "reward"):
        for index, model in enumerate(recipe.reward.models):
            yield ("reward", "models", index), model
    if on_policy(recipe):
        for index, judge in enumerate(recipe.eval.models):
            yield ("eval", "models", index), judge


def program_of(recipe: Recipe) -> Program:
    """Which loop runs the objective, and so what its rows are. Outside objectives run in the policy loop."""
    chosen = preset(recipe.objective)
    if chosen.online and reduce(getattr, chosen.online.split("."), recipe):
        return "policy"
    return chosen.program


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


# The models


@rule
def policy_is_loaded_or_made(recipe: Recipe) -> Iterator[Problem]:
    path, scratch = recipe.policy.path, recipe.policy.scratch
    if (path is None) == (scratch is None):
        what = (
            "neither policy.path nor policy.scratch is" if path is None else "both policy.path and policy.scratch are"
        )
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
def reward_models_have_a_class(recipe: Recipe) -> Iterator[Problem]:
    scratch = recipe.policy.scratch
    if recipe.objective == "reward" and scratch is not None and scratch.family == "gemma4":
        yield Problem(
            ("policy", "scratch", "family"),
            "gemma4 has no sequence-classification class in transformers, so it cannot be a reward model; use gemma3",
        )


@rule
def adapters_need_a_base(recipe: Recipe) -> Iterator[Problem]:
    if recipe.policy.lora is not None and recipe.policy.scratch is not None:
        yield Problem(("policy", "lora"), "adapters on random frozen weights learn next to nothing; remove it")


@rule
def adapters_leave_the_head_alone(recipe: Recipe) -> Iterator[Problem]:
    lora = recipe.policy.lora
    if lora is not None and not isinstance(lora.targets, str) and any("lm_head" in name for name in lora.targets):
        yield Problem(
            ("policy", "lora", "targets"),
            "lm_head gets no adapter: log-probabilities are made from its weight in chunks; leave it out",
        )


@rule
def reference_can_be_placed(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "reference"):
        return
    moves = "ema" if recipe.reference.ema > 0 else "reset_steps" if recipe.reference.reset_steps else None
    if moves is not None and program_of(recipe) == "preference":
        yield Problem(
            ("reference", moves), f"{recipe.objective} on the data's pairs knows one reference, which stands still"
        )
    if moves is not None and recipe.reference.path is not None and recipe.policy.lora is not None:
        yield Problem(
            ("reference", moves),
            "moves an adapter, and reference.path has another base below it; remove one of the two",
        )
    placement = recipe.reference.placement
    if placement == "quantized":
        yield Problem(("reference", "placement"), f"{placement} is not in this version; set auto")
    if placement in ("zero3", "offload") and moves is not None:
        yield Problem(
            ("reference", "placement"), f"a reference that moves ({moves}) is whole on every process; set auto"
        )
    whole = recipe.kl.estimator == "exact" or (recipe.kl.loss_beta > 0 and recipe.kl.loss_estimator == "exact_local")
    if placement in ("zero3", "offload") and whole and on_policy(recipe):
        yield Problem(
            ("reference", "placement"),
            "the exact KL reads the reference in the update too; set auto, or kl.estimator=k1",
        )


# The reward


@rule
def reinforce_has_something_to_maximise(recipe: Recipe) -> Iterator[Problem]:
    if not reads(recipe, "reward") or is_dotted(recipe.objective):
        return
    if program_of(recipe) == "preference":
        return  # learns from the data's pairs; rewards only judge held-out completions
    models, functions = recipe.reward.models, recipe.reward.functions
    weights = [*(model.weight for model in models), *(function.weight for function in functions)]
    if not any(weights):
        what = "every source has weight 0 and is only logged" if weights else "there is no reward"
        yield Problem(
            ("reward",),
            f"{what}; {recipe.objective} needs reward.models or reward.functions with an entry of weight ≠ 0",
        )


@rule
def reward_models_are_reachable(recipe: Recipe) -> Iterator[Problem]:
    for here, source in reward_sources(recipe):
        if (source.path is None) == (source.url is None):
            what = "neither path nor url" if source.path is None else "both path and url"
            yield Problem(here, f"{what} given; a reward model is a folder or hub id (`path:`), or a server (`url:`)")
        else:
            yield from _served(here, source) if source.url is not None else _loaded(here, source)


def _served(here: KeyPath, source: RewardSource) -> Iterator[Problem]:
    if (wrong := wrong_addresses(source.url or "")) is not None:
        yield Problem((*here, "url"), wrong)
    if find_spec("httpx") is None or find_spec("tenacity") is None:
        yield Problem((*here, "url"), "asking a server needs httpx and tenacity; `pip install 'rlhf[serve]'`")
    if source.microbatch_tokens is not None:
        yield Problem((*here, "microbatch_tokens"), "a server cuts its own forwards (--batch-tokens); remove it")
    if isinstance(source, RewardModel) and source.placement != "auto":
        yield Problem((*here, "placement"), "a server's weights lie where it runs; set auto")


def _loaded(here: KeyPath, source: RewardSource) -> Iterator[Problem]:
    for key in ("token_env", "give_up_seconds"):
        if key in source.model_fields_set and getattr(source, key) != RewardSource.model_fields[key].default:
            yield Problem((*here, key), "only a server (`url:`) is asked over a network; remove it")
    if isinstance(source, RewardModel) and source.placement == "quantized":
        yield Problem((*here, "placement"), f"{source.placement} is not in this version; set auto")


@rule
def reward_weights_have_a_mean(recipe: Recipe) -> Iterator[Problem]:
    weights = [model.weight for model in recipe.reward.models]
    if reads(recipe, "reward") and recipe.reward.combine == "mean" and any(weights) and sum(weights) == 0:
        yield Problem(("reward", "models"), "the weights add up to 0, and the weighted mean divides by their sum")


# The algorithm


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


@rule
def completions_are_decoded_here(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.rollout
    if on_policy(recipe) and settings.engine == "vllm" and settings.url is None and find_spec("vllm") is None:
        yield Problem(("rollout", "engine"), "vllm is not installed; `pip install 'rlhf[vllm]'`, or set hf")


@rule
def a_server_is_vllm(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.rollout
    if settings.url is not None and settings.engine != "vllm":
        yield Problem(("rollout", "url"), "a server decodes for engine=vllm alone; set rollout.engine=vllm, or null")
    if settings.token_env is not None and settings.url is not None and settings.token_env not in os.environ:
        yield Problem(("rollout", "token_env"), f"{settings.token_env} is not set; export it with the server's token")


@rule
def decoding_ahead_needs_somebody_else_who_decodes(recipe: Recipe) -> Iterator[Problem]:
    if not (on_policy(recipe) and recipe.rollout.ahead):
        return
    if recipe.rollout.url is None:
        yield Problem(
            ("rollout", "ahead"), "nothing decodes beside the trainer; start `rlhf serve-policy` and set rollout.url"
        )
    if preset(recipe.objective).trust_region:
        yield Problem(("rollout", "ahead"), "a trust region is one around the policy that sampled; set false")


@rule
def nothing_is_pushed(recipe: Recipe) -> Iterator[Problem]:
    if recipe.checkpoint.hub_id is not None:
        yield Problem(
            ("checkpoint", "hub_id"),
            "pushing is not in this version; set null and upload `final/` when you are content",
        )


@rule
def the_best_can_be_found(recipe: Recipe) -> Iterator[Problem]:
    """The best of something that is never measured would be nothing, and nobody would notice."""
    name = recipe.eval.keep_best
    if name is None:
        return
    if not recipe.data.eval or recipe.eval.every_steps is None:
        missing = "data.eval is empty" if not recipe.data.eval else "eval.every_steps is null"
        yield Problem(("eval", "keep_best"), f"{missing}, so {name} is not measured on the way; set it, or null here")
    known = _EVALUATED.get(recipe.objective, () if not on_policy(recipe) else _EVALUATED["reinforce"])
    judged = [item.call.partition(":")[2] for item in recipe.reward.functions]
    judged += [call.partition(":")[2] for call in recipe.eval.functions]
    names = (*known, *(f"eval/{judge}_mean" for judge in judged))
    models = on_policy(recipe) and (recipe.reward.models or recipe.eval.models)
    if name not in names and not (models and name.endswith("_mean")):
        close = near(name, names)
        hint = f"did you mean {close}? " if close else ""
        yield Problem(("eval", "keep_best"), f"{shown(name)} is not measured; {hint}There are {', '.join(names)}")


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
        if source.format not in ("auto", "text") and not is_dotted(source.format):
            yield Problem(
                ("data", "prompt_tokens"),
                f"cuts prompts from plain text, and data.train.{index}.format is {shown(source.format)}, whose rows "
                "have prompts of their own; remove one of the two",
            )
