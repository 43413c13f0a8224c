"""The frozen reference: a model of its own, or the policy with its adapter switched off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.head import ChunkedHead, ReferenceStates
from rlhf.models.layout import Rows
from rlhf.models.policy import ScoredModel, reference_states, token_stats


class Reference(Protocol):
    """π_ref, without gradient."""

    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        """Token statistics of the reference on laid-out rows."""

    def states(self, rows: Rows) -> ReferenceStates:
        """Hidden states and head: the reference's whole distribution, for the exact KL."""


@dataclass(frozen=True)
class FrozenReference:
    """A frozen copy (or another checkpoint) held beside the policy."""

    model: ScoredModel

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        return token_stats(self.model, rows, request)

    def states(self, rows: Rows) -> ReferenceStates:
        return reference_states(self.model, rows, self.model.head)


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

    def _head(self) -> ChunkedHead:
        return self.policy.head

    def _adapter_off(self) -> Any:
        return self.policy.causal_lm.disable_adapter()  # type: ignore[operator]
