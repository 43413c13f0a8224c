"""Rules between keys, each with its reason: models, where they lie, who scores, who decodes.

A rule looks only at what the objective reads: sections of other objectives may hold anything the schema allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rlhf.objectives.presets import is_dotted, preset
from rlhf.recipe.marks import KeyPath, Problem
from rlhf.recipe.reading import on_policy, program_of, quantized, reads, reward_sources
from rlhf.recipe.schema import Recipe
from rlhf.recipe.sections import RewardModel, RewardSource
from rlhf.recipe.servers import addresses, wrong_addresses
from rlhf.recipe.validate import Rule, registrar

_NO_PLACE = "placement would cut them into shares or move them; set placement=auto, or quantize=null"
RULES: list[Rule] = []
rule = registrar(RULES)


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
    if placement in ("zero3", "offload") and moves is not None:
        yield Problem(
            ("reference", "placement"), f"a reference that moves ({moves}) is whole on every process; set auto"
        )
    if placement in ("zero3", "offload") and program_of(recipe) == "preference":
        yield Problem(("reference", "placement"), "pairs' log π_ref are kept by the weights, which it hides; set auto")
    whole = recipe.kl.estimator == "exact" or (recipe.kl.loss_beta > 0 and recipe.kl.loss_estimator == "exact_local")
    if placement in ("zero3", "offload") and whole and on_policy(recipe):
        yield Problem(
            ("reference", "placement"),
            "the exact KL reads the reference in the update too; set auto, or kl.estimator=k1",
        )


@rule
def a_quantized_policy_is_frozen_below_an_adapter(recipe: Recipe) -> Iterator[Problem]:
    here, settings = ("policy", "quantize"), recipe.policy
    if settings.quantize is None:
        return
    if settings.lora is None:
        yield Problem(here, "quantized weights are not trained; add policy.lora (QLoRA), or set null")
    if recipe.objective == "reward":
        yield Problem(here, "a reward model is saved whole, in weights that these no longer are; set null")
    if on_policy(recipe) and recipe.rollout.engine == "vllm":
        yield Problem(
            here, "vLLM is given whole weights, many times what was saved; set rollout.engine=hf, or null here"
        )
    if reads(recipe, "reference") and (recipe.reference.ema > 0 or recipe.reference.reset_steps):
        yield Problem(here, "a reference that moves is a copy of the policy in whole weights; set null here, or there")


@rule
def a_quantized_reference_is_read_from_its_folder(recipe: Recipe) -> Iterator[Problem]:
    here, settings = ("reference", "quantize"), recipe.reference
    if settings.quantize is None or not reads(recipe, "reference"):
        return
    if settings.path is None and recipe.policy.lora is not None:
        yield Problem(here, "the reference is the policy with its adapter off; set policy.quantize=4bit instead")
    elif settings.path is None and recipe.policy.path is None:
        yield Problem(here, "weights are quantized while they are read, and policy.scratch has no folder; set null")
    if settings.ema > 0 or settings.reset_steps:
        yield Problem(here, "a reference that moves has whole weights; set null")
    if settings.placement in ("zero3", "offload"):
        yield Problem(here, f"quantized weights stay where they are, and {_NO_PLACE}")


@rule
def quantizing_needs_bitsandbytes(recipe: Recipe) -> Iterator[Problem]:
    if find_spec("bitsandbytes") is None:
        for here, _ in quantized(recipe):
            yield Problem((*here, "quantize"), "bitsandbytes is not installed; `pip install 'rlhf[quantize]'`")


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
    if source.quantize is not None:
        yield Problem((*here, "quantize"), "a server's weights are as it loaded them; remove it")


def _loaded(here: KeyPath, source: RewardSource) -> Iterator[Problem]:
    for key in ("token_env", "give_up_seconds", "send"):
        if key in source.model_fields_set and getattr(source, key) != RewardSource.model_fields[key].default:
            yield Problem((*here, key), "only a server (`url:`) is asked over a network; remove it")
    if isinstance(source, RewardModel) and source.quantize is not None and source.placement in ("zero3", "offload"):
        yield Problem((*here, "quantize"), f"quantized weights stay where they are, and {_NO_PLACE}")


@rule
def a_base_is_shared_with_an_adapter(recipe: Recipe) -> Iterator[Problem]:
    for here, source in reward_sources(recipe):
        if not (isinstance(source, RewardModel) and source.placement == "policy_base") or source.path is None:
            continue
        key = (*here, "placement")
        if program_of(recipe) != "policy":
            yield Problem(key, f"{recipe.objective} scores only held-out completions; set auto")
        elif recipe.policy.lora is None:
            yield Problem(
                key,
                "without policy.lora the policy trains its base away from the reward model's; set policy.lora, or auto",
            )
        elif recipe.policy.path is None:
            yield Problem(key, "a policy from scratch has a base of its own; set auto")
        if recipe.policy.quantize is not None or source.quantize is not None:
            yield Problem(key, "the adapter was trained on whole weights, not on quantized ones; set auto")


@rule
def reward_weights_have_a_mean(recipe: Recipe) -> Iterator[Problem]:
    weights = [model.weight for model in recipe.reward.models]
    if reads(recipe, "reward") and recipe.reward.combine == "mean" and any(weights) and sum(weights) == 0:
        yield Problem(("reward", "models"), "the weights add up to 0, and the weighted mean divides by their sum")


@rule
def completions_are_decoded_here(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.rollout
    if on_policy(recipe) and settings.engine == "vllm" and settings.url is None and find_spec("vllm") is None:
        yield Problem(("rollout", "engine"), "vllm is not installed; `pip install 'rlhf[vllm]'`, or set hf")


@rule
def vllm_is_given_whole_weights(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.rollout
    if on_policy(recipe) and settings.engine == "vllm" and settings.gather == "layers":
        yield Problem(("rollout", "gather"), "vllm decodes with weights of its own, pushed to it whole; set whole")


@rule
def a_server_is_vllm(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.rollout
    if settings.url is not None and (wrong := wrong_addresses(settings.url)) is not None:
        yield Problem(("rollout", "url"), wrong)
    elif settings.url is not None and len(addresses(settings.url)) > 1:
        yield Problem(("rollout", "url"), "names several servers; weights are pushed to one, so name that one")
    if settings.url is not None and settings.engine != "vllm":
        yield Problem(("rollout", "url"), "a server decodes for engine=vllm alone; set rollout.engine=vllm, or null")


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
