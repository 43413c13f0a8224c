"""Data-sheet figures of GPUs, and what share of them a step is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Card:
    """flops: dense bfloat16, a second. bandwidth: of its memory, bytes a second. link: to the other GPUs of its
    machine, bytes a second one way. memory: bytes that a program finds. source: where the figures stand."""

    flops: float
    bandwidth: float
    link: float
    memory: float
    source: str


CARDS: dict[str, Card] = {
    "a100": Card(
        flops=312e12, bandwidth=2.039e12, link=300e9, memory=79 * 2**30, source="NVIDIA A100 data sheet, SXM 80 GB"
    ),
    "h100": Card(
        flops=989e12, bandwidth=3.35e12, link=450e9, memory=79 * 2**30, source="NVIDIA H100 data sheet, SXM 80 GB"
    ),
    "h200": Card(
        flops=989e12, bandwidth=4.8e12, link=450e9, memory=139 * 2**30, source="NVIDIA H200 data sheet, SXM 141 GB"
    ),
    "b200": Card(
        flops=2250e12, bandwidth=8e12, link=900e9, memory=178 * 2**30, source="NVIDIA DGX B200 data sheet, per GPU"
    ),
    "l40s": Card(flops=362e12, bandwidth=0.864e12, link=32e9, memory=44 * 2**30, source="NVIDIA L40S data sheet"),
    "rtx4090": Card(
        flops=165e12,
        bandwidth=1.008e12,
        link=32e9,
        memory=23.5 * 2**30,
        source="NVIDIA Ada architecture paper, RTX 4090",
    ),
}
# Assumed, not measured: of the dense peak in training and in forwards, of the memory's bandwidth in decoding, of the
# link; and what Python and starting kernels take a layer and token, whatever the size (seconds).
TRAIN_MFU, FORWARD_MFU, DECODE_BANDWIDTH, LINK = 0.35, 0.45, 0.5, 0.6
LAUNCH_SECONDS = 1.5e-4
BETWEEN_NODES = 50e9  # bytes a second a GPU: one 400 Gbit/s port each


def card(name: str) -> Card:
    """By name, as the command line has it. Raises UserError."""
    found = CARDS.get(name.lower())
    if found is None:
        raise UserError(f"no figures of a GPU called {name!r}; known: {', '.join(CARDS)} (or leave --gpu out)")
    return found
