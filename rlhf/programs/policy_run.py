"""What the policy loop runs on: the objects of a run, each behind its seam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rlhf.interfaces import PolicyObjective, Sampler, TokenStats
from rlhf.models.layout import Layout
from rlhf.models.reference import Reference
from rlhf.programs.evaluation import Evaluation
from rlhf.programs.session import Session
from rlhf.rewards.combine import RewardSet
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime.distributed import unwrap
from rlhf.runtime.updater import Term, Updater


class PromptStream(Protocol):
    def at(self, step: int) -> tuple[Sequence[Prompt], Sequence[int]]:
        """This rank's prompts of a step and their slots in the step's global prompt list."""


class InstructionStream(Protocol):
    def at(self, step: int) -> Term:
        """This rank's gold completions of a step, as a term of the loss."""

    def metrics(self, batch: TokenBatch, stats: TokenStats) -> dict[str, float]:
        """What the update's forward says of them."""


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """Everything the loop calls. Built by ``assemble``; every field can be replaced without touching the loop."""

    session: Session
    model: nn.Module
    sampler: Sampler
    rewards: RewardSet
    reference: Reference
    objective: PolicyObjective
    beta: float
    layout: Layout
    updater: Updater
    prompts: PromptStream
    instruction: InstructionStream | None
    evaluation: Evaluation
    steps: int
    seed: int
    samples_logged: int


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside wrapper and ``ScoredModel``: what decodes."""
    inner: nn.Module = unwrap(model).causal_lm  # type: ignore[assignment]
    return inner
