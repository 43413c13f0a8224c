"""The output head as a module that turns hidden states into token statistics and never holds all logits.

A 256k vocabulary makes logits the largest tensor of a step: 4,096 positions are 4 GiB in fp32. ``ChunkedHead`` makes
them a tile at a time (``models.tiles``). It stands in ``lm_head``'s place and is called as a module: under ZeRO-3 a
weight read outside its own module is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.interfaces import StatsRequest
from rlhf.models.tiles import Plan, PositionStats, TiledStatistics

__all__ = ["ChunkedHead", "PositionStats", "ReferenceStates"]

# fp32 logits of a tile: a processor cache holds it with its copies; large enough for a GPU's products.
CPU_BYTES, GPU_BYTES = 2**20, 256 * 2**20


@dataclass(frozen=True)
class ReferenceStates:
    """The reference's final hidden states at the same positions ([n, H_ref]) and the head that reads them."""

    hidden: Tensor
    head: ChunkedHead


class ChunkedHead(nn.Module):
    """Replaces ``lm_head``; shares its parameters under the same names.

    ``forward(hidden)`` gives logits as before, so ``generate`` goes on working. ``forward(hidden, targets, request)``
    gives ``PositionStats`` from tiles of ``chunk_bytes`` of fp32 logits (None: by the device), a few at a time.

    softcap: Gemma 2's final logit cap, cap·tanh(logits/cap). The causal LM applies it to plain logits itself.
    fused: backward adds to ``weight.grad`` itself, which saves a buffer of the weight's size where nothing listens to
    its gradient (one process).
    """

    def __init__(self, linear: nn.Linear, softcap: float | None = None, chunk_bytes: int | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.softcap = softcap
        self.chunk_bytes = chunk_bytes
        self.fused = False
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
        if request.reference and reference is None:
            raise ValueError("the request asks for exact KL, but no reference states were handed in")
        other = reference.head if reference is not None and request.reference else None
        states = reference.hidden if reference is not None and request.reference else None
        plan = self._plan(hidden, request, other)
        weights = (other.weight, other.bias) if other is not None else (None, None)
        with torch.autocast(hidden.device.type, enabled=False):  # products are taken in ``plan.dtype``
            found: tuple[Tensor | None, ...] = TiledStatistics.apply(  # type: ignore[no-untyped-call]
                hidden, self.weight, self.bias, targets, plan, states, *weights
            )
        return found

    def _plan(self, hidden: Tensor, request: StatsRequest, other: ChunkedHead | None) -> Plan:
        device = hidden.device.type
        low = torch.is_autocast_enabled(device)
        return Plan(
            request=request,
            softcap=self.softcap,
            ref_softcap=other.softcap if other is not None else None,
            elements=(self.chunk_bytes or (CPU_BYTES if device == "cpu" else GPU_BYTES)) // 4,
            dtype=torch.get_autocast_dtype(device) if low else self.weight.dtype,
            fused=self.fused,
        )
