"""Bytes of a frozen model on one process: whole, in shares, in host memory outside its phase, or on another's base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.models.quantized import Bits
from rlhf.planning.placement import LIVE, Placement
from rlhf.planning.shapes import Shape

Where = Literal["replicate", "zero3", "offload", "policy_base"]
SAID = {
    "replicate": "a copy a process",
    "zero3": "in shares",
    "offload": "in host memory while it is idle",
    "policy_base": "an adapter on the policy's base",
}


@dataclass(frozen=True)
class FrozenHeld:
    """always: through the run. used: beside that while it computes. host: of its node's memory. said: in words."""

    always: float
    used: float
    host: float
    said: str


def whole_bytes(shape: Shape, size: int, bits: Bits | None) -> float:
    """Of a model at ``size`` bytes a weight; with ``bits`` its linear layers have fewer."""
    if bits is None:
        return float(shape.parameters * size)
    return float((shape.parameters - shape.packable) * size) + shape.packed(bits)


def frozen_held(shape: Shape, size: int, where: Where, placement: Placement, bits: Bits | None = None) -> FrozenHeld:
    """size: bytes a weight. One process has nobody to share with, and a CPU is where offloaded weights would go."""
    total, parameters = whole_bytes(shape, size, bits), shape.parameters
    said = SAID["replicate"] if bits is None else f"{SAID['replicate']}, {bits}"
    if where == "zero3" and placement.processes > 1:
        return FrozenHeld(total / placement.processes, float(size * min(parameters, LIVE)), 0.0, SAID[where])
    if where == "offload" and not placement.cpu:
        return FrozenHeld(0.0, total, total, SAID[where])
    return FrozenHeld(total, 0.0, 0.0, said)


def beside_held(shape: Shape, rank: int, size: int) -> FrozenHeld:
    """An adapter and a score head on a base that the policy holds already. size: bytes of an adapter's weight."""
    return FrozenHeld(float(size * shape.adapter(rank) + 4 * shape.head), 0.0, 0.0, SAID["policy_base"])
