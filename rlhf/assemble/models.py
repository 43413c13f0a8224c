"""Recipe → models and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf.assemble.data import sources
from rlhf.data import load as data
from rlhf.errors import UserError
from rlhf.models import load, masks, scratch
from rlhf.models.critic import Critic, ValueHead
from rlhf.models.layout import Layout, SharedPrompts, plain_rows
from rlhf.models.policy import ScoredModel
from rlhf.models.quantized import Bits, Quantization, weights
from rlhf.models.reference import FrozenReference, MovingReference, Reference
from rlhf.objectives.presets import OBJECTIVES
from rlhf.recipe import Recipe
from rlhf.recipe.reading import reads
from rlhf.runtime import distributed, step_size
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.placement import Placement, place
from rlhf.runtime.schedule import learning_rate_schedule
from rlhf.runtime.updater import Forward, Updater

NO_SHARDS = (
    "policy.quantize=4bit: ZeRO-3 and FSDP2 cut weights into shares, and quantized ones are read with figures that "
    "they do not know of; launch DDP or ZeRO-2, or set policy.quantize=null"
)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return distributed.auto_dtype(recipe.policy.compute_dtype)


def tokenizer_of(recipe: Recipe) -> Any:
    """The policy's tokenizer: loaded, borrowed, or trained on ``data.train``."""
    policy = recipe.policy
    source = policy.path or policy.tokenizer
    if source is not None:
        tokenizer = load.load_tokenizer(source)
    else:
        assert policy.scratch is not None
        tokenizer = scratch.train_tokenizer(data.training_texts(sources(recipe.data.train)), policy.scratch.vocab_size)
    if policy.chat_template != "auto":
        tokenizer.chat_template = Path(policy.chat_template).read_text(encoding="utf-8")
    return tokenizer


def causal_lm(recipe: Recipe, tokenizer: Any, device: torch.device) -> nn.Module:
    """The policy's weights, with an adapter where the recipe asks for one. device: where quantized weights lie."""
    if recipe.policy.path is not None:
        model = loaded_policy(recipe, device)
    else:
        model = scratch.build_causal_lm(scratch_config(recipe, len(tokenizer)), recipe.run.seed)
    return _adapted(recipe, model, "CAUSAL_LM")


def loaded_policy(recipe: Recipe, device: torch.device) -> nn.Module:
    """What ``policy.path`` holds, without an adapter of this run."""
    policy = recipe.policy
    assert policy.path is not None
    found = quantization(recipe, policy.quantize, device)
    return load.load_causal_lm(policy.path, attention=policy.attention, quantize=found)


def quantization(recipe: Recipe, bits: Bits | None, device: torch.device) -> Quantization | None:
    """How weights of these bits are loaded; None = as they are."""
    return None if bits is None else Quantization(bits, compute_dtype(recipe), device)


def weightless(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """The policy on the meta device: what it is made of, without weights and adapter."""
    if recipe.policy.path is not None:
        return load.weightless_causal_lm(recipe.policy.path)
    with torch.device("meta"):
        return scratch.empty_causal_lm(scratch_config(recipe, len(tokenizer)))


def classifier(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """The reward model to train: from scratch, or a causal LM's trunk with a new scalar head; with an adapter where the
    recipe asks for one."""
    policy = recipe.policy
    if policy.path is None:
        model: nn.Module = scratch.build_reward_model(scratch_config(recipe, len(tokenizer)), recipe.run.seed)
    else:
        model = load.load_classifier(policy.path, recipe.run.seed, attention=policy.attention)
    return _adapted(recipe, model, "SEQ_CLS")


def _adapted(recipe: Recipe, model: nn.Module, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> nn.Module:
    lora = recipe.policy.lora
    load.keep_activations(model, recipe.batch.activations)
    if lora is None:
        return model
    return load.add_lora(model, load.LoraSpec(lora.r, lora.alpha, lora.targets), recipe.run.seed, task=task)


def scratch_config(recipe: Recipe, vocab_size: int) -> Any:
    """Of a policy, or a reward model, that starts from random weights."""
    spec = recipe.policy.scratch
    assert spec is not None
    return scratch.build_config(
        spec.family,
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        heads=spec.heads,
        vocab_size=vocab_size,
        intermediate_size=spec.intermediate_size,
    )


def scored(recipe: Recipe, runtime: Runtime, lm: nn.Module, critic: nn.Module | None = None) -> ScoredModel:
    """The policy as it is trained. Nothing but the optimizer reads a gradient where there is one process."""
    return ScoredModel(lm, compute_dtype=compute_dtype(recipe), critic=critic, fused=runtime.kind == "single")


def parameters(model: nn.Module) -> int:
    """How many weights a model has, on all processes together where it is in shares."""
    return sum(map(weights, model.parameters()))


def adamw(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained, without weight decay; betas are PyTorch's. A critic has its own learning rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for of_critic, scale in ((False, 1.0), (True, (recipe.value.lr or recipe.optim.lr) / recipe.optim.lr)):
        part = [parameter for name, parameter in named if name.startswith("critic.") is of_critic]
        groups += [{"params": part, "lr_scale": scale}] if part else []
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, eps=recipe.optim.eps, weight_decay=0.0)


def critic(recipe: Recipe, tokenizer: Any, policy: nn.Module, note: Callable[[str], None]) -> nn.Module:
    """The value model: the reward model's weights where it reads the policy's tokens, else the policy's trunk and a new
    head (``value.init: zeros``: one that says 0); or a head on the policy itself."""
    path, settings = recipe.policy.path, recipe.value
    if settings.shared:
        return ValueHead(load.base_model(policy).config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
    if settings.init == "reward":
        judge = recipe.reward.models[0].path if recipe.reward.models else None
        if judge is not None and load.load_tokenizer(judge, what="reward model").get_vocab() == tokenizer.get_vocab():
            path = judge
        else:
            served = bool(recipe.reward.models) and recipe.reward.models[0].url is not None
            nothing = "the reward model is a server's" if served else "there is no reward model"
            why = nothing if judge is None else f"{judge} has another vocabulary"
            note(f"value.init: {why}, so the value model starts from the policy with a new head")
    if path is None:
        model: Any = scratch.build_reward_model(scratch_config(recipe, len(tokenizer)), recipe.run.seed)
    else:
        model = load.load_classifier(path, recipe.run.seed, attention=recipe.policy.attention)
    load.keep_activations(model, recipe.batch.activations)
    if settings.init == "zeros":
        torch.nn.init.zeros_(model.score.weight)
    return Critic(model)


def reference(recipe: Recipe, policy: ScoredModel, runtime: Runtime) -> FrozenReference | None:
    """Another checkpoint, or a copy of the policy as it is now, which may follow it; None where an adapter switched off
    will do."""
    settings, dtype = recipe.reference, compute_dtype(recipe)
    how = placement(settings.placement)
    moves = settings.ema > 0 or settings.reset_steps is not None
    path = settings.path or (recipe.policy.path if settings.quantize is not None else None)
    if path is not None:
        found = quantization(recipe, settings.quantize, runtime.device)
        model = load.load_causal_lm(path, attention=recipe.policy.attention, what="reference.path", quantize=found)
    elif recipe.policy.lora is not None and not moves:
        return None
    else:
        model = load.frozen_copy(policy.causal_lm)
    frozen = ScoredModel(model, compute_dtype=dtype).requires_grad_(False).eval()
    placed = place(frozen, how, runtime.device, runtime)
    if not moves:
        return FrozenReference(frozen, placed)
    decay = settings.ema if settings.ema > 0 else 1.0
    follower = MovingReference(frozen, placed, policy=policy, decay=decay, every_steps=settings.reset_steps)
    follower.refuse_strangers()
    return follower


def placement(asked: str) -> Placement:
    """Where a frozen model lies; ``auto`` is whole on every process."""
    return "replicate" if asked == "auto" else cast(Placement, asked)


def layout(recipe: Recipe, policy: ScoredModel, reference: Reference) -> Layout:
    """Rows that share their prompt, where everything that reads them takes masks of ours."""
    parts: list[Any] = [policy.causal_lm, getattr(policy.critic, "classifier", None)]
    parts.append(reference.model.causal_lm if isinstance(reference, FrozenReference) else None)
    known = all(masks.known(load.base_model(part)) for part in parts if part is not None)
    return SharedPrompts() if recipe.batch.share_prompts and known else plain_rows


def updater(
    recipe: Recipe,
    runtime: Runtime,
    model: nn.Module,
    optimizer: Any,
    forward: Forward,
    steps: int,
    layout: Layout = plain_rows,
) -> Updater:
    """``steps``: the learning rate's horizon, in optimizer steps. ``layout``: ``forward``'s.

    Raises UserError where steps are to be measured and cannot be: weights in shards, or no memory for copies of them.
    """
    optim = recipe.optim
    schedule = learning_rate_schedule(optim.lr, optim.schedule, total_steps=steps, warmup_ratio=optim.warmup_ratio)
    budget = recipe.batch.microbatch_tokens
    plain = Updater(runtime, model, optimizer, schedule, forward, budget, optim.max_grad_norm, layout.cells)
    trust, limit = trust_region(recipe), optim.kl_step_limit
    if not trust and limit is None:
        return plain
    policy = cast(ScoredModel, distributed.unwrap(model))
    if trust:
        step_size.refuse_lack_of_memory(policy, runtime)
    before = step_size.Before.of(runtime, model, policy, budget, layout)
    if limit is not None:
        return replace(plain, limit=step_size.KlLimit(before, limit))
    settings = recipe.trpo
    known = {item.name: getattr(plain, item.name) for item in fields(plain)}
    return step_size.TrustRegion(
        **{**known, "learning_rate": lambda step: 0.0, "max_grad_norm": None},  # neither has a part in its steps
        before=before,
        max_kl=settings.max_kl,
        damping=settings.damping,
        iterations=settings.iterations,
        backtracks=settings.backtracks,
    )


def trust_region(recipe: Recipe) -> bool:
    """Whether the objective's steps are TRPO's."""
    chosen = OBJECTIVES.get(recipe.objective)
    return chosen is not None and chosen.trust_region


def refuse_what_needs_whole_weights(recipe: Recipe, runtime: Runtime) -> None:
    """Before anything is loaded: raises UserError where weights are in shards and something reads them whole between
    steps, or where steps are to be measured and never can be."""
    if recipe.policy.quantize is not None and runtime.sharded:
        raise UserError(NO_SHARDS)
    settings = recipe.reference
    if runtime.sharded and reads(recipe, "reference") and (settings.ema > 0 or settings.reset_steps is not None):
        raise UserError(
            f"reference.ema and reset_steps read whole weights, which {runtime.kind} holds in shards: launch with ddp "
            "or zero2, or set reference.ema=0 and reset_steps=null"
        )
    if trust_region(recipe) or recipe.optim.kl_step_limit is not None:
        step_size.refuse_shards(runtime)
    if trust_region(recipe) and compute_dtype(recipe) != torch.float32:
        raise UserError(
            "policy.compute_dtype: auto means bfloat16 on this hardware, and trpo takes differences of gradients, "
            "which its 8 bits round away; set float32"
        )
