"""Solving A·x = b by products with A alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x ≈ A⁻¹·target for a symmetric positive definite A, given v ↦ A·v (Hestenes & Stiefel 1952). [n] → [n].

    Ends after ``iterations`` products, once ‖target − A·x‖² ≤ tolerance·‖target‖², or at a direction in which the
    product shows no positive curvature (A is not what was promised, or rounding has the word); x until there is kept.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), float(residual @ residual)
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        length = squared / curvature
        x += length * direction
        residual -= length * image
        before, squared = squared, float(residual @ residual)
        direction = residual + (squared / before) * direction
    return x
