"""The output head as a module that turns hidden states into token statistics, a chunk of positions at a time.

A 256k vocabulary makes logits the largest tensor of a step: 4,096 positions are 4 GiB in fp32. ``ChunkedHead`` holds
one chunk of them. It stands in ``lm_head``'s place and is called as a module: under ZeRO-3 a weight read outside its
own module is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlhf.interfaces import StatsRequest
from rlhf.maths import kl, logprobs

CHUNK_BYTES = 256 * 2**20


class PositionStats(NamedTuple):
    """Statistics per position, [n] each; None = not asked for. A plain tuple of tensors: ZeRO-3 hooks look inside."""

    logprobs: Tensor
    entropy: Tensor | None
    score_norms: Tensor | None
    kl: Tensor | None
    ref_logprobs: Tensor | None


@dataclass(frozen=True)
class ReferenceStates:
    """The reference's final hidden states at the same positions ([n, H_ref]) and the head that reads them."""

    hidden: Tensor
    head: ChunkedHead


class ChunkedHead(nn.Module):
    """Replaces ``lm_head``; shares its parameters under the same names.

    ``forward(hidden)`` gives logits as before, so ``generate`` goes on working. ``forward(hidden, targets, request)``
    gives ``PositionStats`` without ever holding more than ``chunk_bytes`` of fp32 logits for backward.

    softcap: Gemma 2's final logit cap, cap·tanh(logits/cap). The causal LM applies it to plain logits itself.
    """

    def __init__(self, linear: nn.Linear, softcap: float | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.softcap = softcap
        self.chunk_bytes = chunk_bytes
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        request: StatsRequest | None = None,
        reference: ReferenceStates | None = None,
    ) -> Tensor | tuple[Tensor | None, ...]:
        if targets is None or request is None:
            return F.linear(hidden, self.weight, self.bias)
        size = max(1, self.chunk_bytes // (4 * self.out_features))
        pieces = [
            self._chunk(hidden[at : at + size], targets[at : at + size], request, reference, at, len(targets) > size)
            for at in range(0, max(len(targets), 1), size)
        ]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] → [n, V], soft-capped: what the distribution is made of."""
        logits = F.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _chunk(
        self,
        hidden: Tensor,
        targets: Tensor,
        request: StatsRequest,
        reference: ReferenceStates | None,
        start: int,
        several: bool,
    ) -> PositionStats:
        states = reference.hidden[start : start + len(targets)] if reference is not None else None
        ref_head = reference.head if reference is not None else None
        if several and torch.is_grad_enabled():  # keep [chunk, H], not [chunk, V]: backward computes logits again
            return checkpoint(self._stats, hidden, targets, request, states, ref_head, use_reentrant=False)  # type: ignore[no-any-return]
        return self._stats(hidden, targets, request, states, ref_head)

    def _stats(
        self,
        hidden: Tensor,
        targets: Tensor,
        request: StatsRequest,
        ref_hidden: Tensor | None,
        ref_head: ChunkedHead | None,
    ) -> PositionStats:
        full = logprobs.log_softmax(self.logits(hidden), request.temperature)
        divergence = ref_chosen = None
        if request.reference:
            if ref_hidden is None or ref_head is None:
                raise ValueError("the request asks for exact KL, but no reference states were handed in")
            with torch.no_grad():
                ref_full = logprobs.log_softmax(ref_head.logits(ref_hidden), request.temperature)
                ref_chosen = logprobs.chosen(ref_full, targets)
            divergence = kl.exact_kl(full, ref_full)
        with torch.no_grad():
            entropy = logprobs.entropy_of(full) if request.entropy else None
            norms = logprobs.score_norms_of(full, targets) if request.score_norms else None
        return PositionStats(logprobs.chosen(full, targets), entropy, norms, divergence, ref_chosen)
