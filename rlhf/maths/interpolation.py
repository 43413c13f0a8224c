"""Means of weights: between models that were trained from the same start, also the average is a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w·θ / Σ w, computed in float64. The average of reward models is WARM's (Ramé et al. 2024a, eq. 2)."""
    total = sum(weights)
    if abs(total) < 1e-12:
        raise ValueError(f"weights {list(weights)} add up to 0, so their mean is not defined")
    mean = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights, strict=True):
        mean += (weight / total) * value.double()
    return mean


def slerp(base: Tensor, first: Tensor, second: Tensor, at: float) -> Tensor:
    """base + the point ``at`` (0 = first, 1 = second) of the arc between the two differences from base, in float64.

    sin((1−λ)Ω)/sin Ω · δ₁ + sin(λΩ)/sin Ω · δ₂, Ω the angle between δ₁ and δ₂, where linear averaging would shorten
    them (WARP, Ramé et al. 2024b, eq. 2). Linear where the two are parallel, or one of them is 0.
    """
    start = base.double()
    one, two = first.double() - start, second.double() - start
    norms = one.norm() * two.norm()
    cosine = float((one * two).sum() / norms) if norms > 0 else 1.0
    angle = torch.tensor(min(1.0, max(-1.0, cosine)), dtype=torch.float64).acos()
    if angle.sin() < 1e-6:
        return start + (1 - at) * one + at * two
    return start + (((1 - at) * angle).sin() * one + (at * angle).sin() * two) / angle.sin()
