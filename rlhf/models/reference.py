"""The reference: a frozen model of its own, the policy with its adapter switched off, or a follower of the policy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.head import ChunkedHead, ReferenceStates
from rlhf.models.layout import Rows
from rlhf.models.policy import ScoredModel, reference_states, token_stats
from rlhf.runtime.placement import Placed


class Reference(Protocol):
    """π_ref, without gradient."""

    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        """Token statistics of the reference on laid-out rows."""

    def states(self, rows: Rows) -> ReferenceStates:
        """Hidden states and head: the reference's whole distribution, for the exact KL."""

    def use(self) -> AbstractContextManager[Any]:
        """Entered around the calls of a phase: weights that lie elsewhere are there inside."""

    def follow(self, step: int) -> None:
        """Called after the updates of each step; a reference that stands still does nothing."""


@dataclass(frozen=True)
class FrozenReference:
    """A frozen copy (or another checkpoint) held beside the policy. placed: where it lies; None = as it is."""

    model: ScoredModel
    placed: Placed | None = None

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        return token_stats(self._where.model, rows, request)

    def states(self, rows: Rows) -> ReferenceStates:
        return reference_states(self._where.model, rows, self.model.head)

    def use(self) -> AbstractContextManager[Any]:
        return self._where.use()

    @property
    def _where(self) -> Placed:
        return self.placed or Placed(self.model)

    def follow(self, step: int) -> None:
        pass


@dataclass(frozen=True)
class MovingReference(FrozenReference):
    """A reference that follows the policy: w_ref ← decay·w_ref + (1 − decay)·w after each step (the EMA anchor of WARP,
    Ramé et al. 2024), or w_ref ← w every so many steps.

    policy: the ``ScoredModel`` that is trained, its weights whole on this process; those that are not trained (below an
    adapter) stay where they are. The penalty then prices the way since then, no longer the distance from the start.
    """

    policy: ScoredModel = field(kw_only=True)
    decay: float = 1.0
    every_steps: int | None = None

    @torch.no_grad()
    def follow(self, step: int) -> None:
        renew = self.every_steps is not None and step % self.every_steps == 0
        decay = 0.0 if renew else self.decay
        if decay < 1:
            for name, own in self.moving().items():
                own.lerp_(self.policy.causal_lm.get_parameter(name).to(own.dtype), 1 - decay)

    def refuse_strangers(self) -> None:
        """Raises UserError where the policy's weights have no counterpart here: it could not follow."""
        own = {name: tuple(value.shape) for name, value in self.model.causal_lm.named_parameters()}
        for name, parameter in self.policy.causal_lm.named_parameters():
            if parameter.requires_grad and own.get(name) != tuple(parameter.shape):
                raise UserError(
                    f"reference.path is another architecture than policy.path ({name}: {own.get(name)} against "
                    f"{tuple(parameter.shape)}), so it cannot follow it; set reference.ema=0 and reset_steps=null"
                )

    def moving(self) -> dict[str, Tensor]:
        """The weights that move, by the policy's names: what a checkpoint must hold of it."""
        own = dict(self.model.causal_lm.named_parameters())
        return {name: own[name] for name, p in self.policy.causal_lm.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class AdapterOffReference:
    """LoRA: the base weights are the reference, so one copy in memory plays both parts.

    wrapped: the policy as accelerate returned it; policy: the ``ScoredModel`` inside.
    """

    wrapped: nn.Module
    policy: ScoredModel

    @torch.no_grad()
    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        with self._adapter_off():
            return token_stats(self.wrapped, rows, request)

    def states(self, rows: Rows) -> ReferenceStates:
        with self._adapter_off():
            return reference_states(self.wrapped, rows, self._head())

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def follow(self, step: int) -> None:
        pass

    def _head(self) -> ChunkedHead:
        return self.policy.head

    def _adapter_off(self) -> Any:
        return self.policy.causal_lm.disable_adapter()  # type: ignore[operator]
