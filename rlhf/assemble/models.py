"""Recipe → models and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhf.assemble.data import sources
from rlhf.data import load as data
from rlhf.models import load, scratch
from rlhf.models.critic import Critic
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.recipe import Recipe
from rlhf.runtime import distributed
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.microbatches import Cost, padded_tokens
from rlhf.runtime.schedule import learning_rate_schedule
from rlhf.runtime.updater import Forward, Updater


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


def causal_lm(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """The policy's weights, with an adapter where the recipe asks for one."""
    policy = recipe.policy
    if policy.path is not None:
        model = load.load_causal_lm(policy.path, attention=policy.attention)
    else:
        model = scratch.build_causal_lm(_scratch_config(recipe, tokenizer), recipe.run.seed)
    return _adapted(recipe, model, "CAUSAL_LM")


def classifier(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """The reward model to train: from scratch, or a causal LM's trunk with a new scalar head; with an adapter where the
    recipe asks for one."""
    policy = recipe.policy
    if policy.path is None:
        return scratch.build_reward_model(_scratch_config(recipe, tokenizer), recipe.run.seed)
    model = load.load_classifier(policy.path, recipe.run.seed, attention=policy.attention)
    return _adapted(recipe, model, "SEQ_CLS")


def _adapted(recipe: Recipe, model: nn.Module, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> nn.Module:
    lora = recipe.policy.lora
    if lora is None:
        return model
    return load.add_lora(model, load.LoraSpec(lora.r, lora.alpha, lora.targets), recipe.run.seed, task=task)


def _scratch_config(recipe: Recipe, tokenizer: Any) -> Any:
    spec = recipe.policy.scratch
    assert spec is not None
    return scratch.build_config(
        spec.family,
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        heads=spec.heads,
        vocab_size=len(tokenizer),
        intermediate_size=spec.intermediate_size,
    )


def parameters(model: nn.Module) -> int:
    """How many weights a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def adamw(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained, without weight decay; betas are PyTorch's. A critic has its own learning rate."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for of_critic, scale in ((False, 1.0), (True, (recipe.value.lr or recipe.optim.lr) / recipe.optim.lr)):
        part = [parameter for name, parameter in named if name.startswith("critic.") is of_critic]
        groups += [{"params": part, "lr_scale": scale}] if part else []
    return torch.optim.AdamW(groups, lr=recipe.optim.lr, eps=recipe.optim.eps, weight_decay=0.0)


def critic(recipe: Recipe, tokenizer: Any, note: Callable[[str], None]) -> Critic:
    """The value model: the reward model's weights where it reads the policy's tokens, else the policy's trunk and a new
    head (``value.init: zeros``: one that says 0)."""
    path, settings = recipe.policy.path, recipe.value
    if settings.init == "reward":
        judge = recipe.reward.models[0].path if recipe.reward.models else None
        if judge is not None and load.load_tokenizer(judge, what="reward model").get_vocab() == tokenizer.get_vocab():
            path = judge
        else:
            why = "there is no reward model" if judge is None else f"{judge} has another vocabulary"
            note(f"value.init: {why}, so the value model starts from the policy with a new head")
    if path is None:
        model: Any = scratch.build_reward_model(_scratch_config(recipe, tokenizer), recipe.run.seed)
    else:
        model = load.load_classifier(path, recipe.run.seed, attention=recipe.policy.attention)
    if settings.init == "zeros":
        torch.nn.init.zeros_(model.score.weight)
    return Critic(model)


def frozen_reference(recipe: Recipe, policy: nn.Module, runtime: Runtime) -> FrozenReference | None:
    """Another checkpoint, or a copy of the policy as it is now; None where an adapter switched off will do."""
    if recipe.reference.path is not None:
        model = load.load_causal_lm(recipe.reference.path, attention=recipe.policy.attention, what="reference.path")
    elif recipe.policy.lora is not None:
        return None
    else:
        model = load.frozen_copy(policy)
    return FrozenReference(ScoredModel(model, compute_dtype=compute_dtype(recipe)).to(runtime.device))


def updater(
    recipe: Recipe,
    runtime: Runtime,
    model: nn.Module,
    optimizer: Any,
    forward: Forward,
    steps: int,
    cost: Cost = padded_tokens,
) -> Updater:
    """``steps``: the learning rate's horizon, in optimizer steps. ``cost``: what ``forward`` makes of a microbatch."""
    optim = recipe.optim
    schedule = learning_rate_schedule(optim.lr, optim.schedule, total_steps=steps, warmup_ratio=optim.warmup_ratio)
    budget = recipe.batch.microbatch_tokens
    return Updater(runtime, model, optimizer, schedule, forward, budget, optim.max_grad_norm, cost)
