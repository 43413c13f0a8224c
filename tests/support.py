"""A tiny Gemma, a fixed rollout and an updater: the smallest real training set-up, for tests."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM

from rlhf.interfaces import Alone, StatsRequest, TrainState
from rlhf.models.layout import plain_rows
from rlhf.models.load import frozen_copy
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Prompt, Rollout
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import PolicyForward, Updater

VOCAB = 300


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where an extra's package is missing. ``make test`` installs them all and says so: there the test
    runs, and fails."""
    missing = importlib.util.find_spec(package) is None and os.environ.get("RLHF_TEST_EXTRAS") != "all"
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def tiny_config(**changes: Any) -> GemmaConfig:
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.2,  # logits of order 1: a distribution worth comparing
    )
    return GemmaConfig(**{**settings, **changes})


def tiny_lm(seed: int = 0, **changes: Any) -> GemmaForCausalLM:
    torch.manual_seed(seed)
    return GemmaForCausalLM(tiny_config(**changes))


def policy_and_reference(seed: int = 0, shift: float = 0.02, **kwargs: Any) -> tuple[ScoredModel, FrozenReference]:
    """A policy that has moved away from its reference, so that the KL is not zero."""
    lm = tiny_lm(seed)
    reference = FrozenReference(ScoredModel(frozen_copy(lm), **kwargs))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(shift * torch.randn(parameter.shape, generator=generator))
    return ScoredModel(lm, **kwargs), reference


def fixed_rollout(prompts: int = 4, k: int = 4, seed: int = 1, rewards: Tensor | None = None) -> Rollout:
    """Prompts and completions of different lengths, each completion ending in the stop id 1."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    rows = prompts * k
    prompt_rows = [ids(3 + index) for index in range(prompts)]
    return Rollout.from_ids(
        [prompt_rows[row // k] for row in range(rows)],
        [[*ids(2 + (row * 7) % 5), 1] for row in range(rows)],
        group=[row // k for row in range(rows)],
        prompts=tuple(Prompt(row_id=row // k, text="x") for row in range(rows)),
        texts=tuple("" for _ in range(rows)),
        sample=torch.arange(rows) % k,
        finished=torch.ones(rows, dtype=torch.bool),
        rewards=torch.randn(rows, generator=generator) if rewards is None else rewards,
    )


def with_reference(rollout: Rollout, reference: FrozenReference, budget: int = 100) -> Rollout:
    found = microbatches.score(rollout, lambda batch: reference.stats(plain_rows(batch), StatsRequest()), budget)
    return replace(rollout, ref_logprobs=found.logprobs, rollout_logprobs=found.logprobs)


def prepared(rollout: Rollout, objective: Reinforce) -> Rollout:
    return objective.prepare(rollout, TrainState(), Alone())[0]


def alone() -> Runtime:
    return Runtime(accelerator=None, kind="single", device=torch.device("cpu"))


def updater(model: ScoredModel, reference: FrozenReference, budget: int = 100, lr: float = 1.0) -> Updater:
    """Plain SGD: with lr 1 the change of the weights is minus the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Updater(alone(), model, optimizer, lambda step: lr, PolicyForward(reference), budget, None)


def weights(model: torch.nn.Module) -> Tensor:
    """All trained weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
