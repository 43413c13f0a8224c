"""Masked and grouped reductions. One polarity everywhere: True = counts.

B = rows (completions), C = padded completion width. Excluded entries are replaced before any arithmetic, so NaN or
infinity there reaches neither a value nor a gradient. Group reductions accumulate in float64, so that taking a row's
own part out of its group's total leaves the others' part intact even beside an outlier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` (broadcast) is True and exactly 0 elsewhere, in value and in gradient."""
    return torch.where(mask, x, 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Σ x over entries that count; all of them, or along ``dim``."""
    return masked_fill(x, mask).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean over entries that count; 0 where none does."""
    return masked_sum(x, mask, dim) / _count(x, mask, dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None, *, unbiased: bool = True) -> Tensor:
    """Variance over entries that count: Σ(x − mean)² / (n − 1), or / n if not ``unbiased``; 0 where n is too small."""
    count = _count(x, mask, dim, keepdim=True).clamp(min=1)
    mean = masked_fill(x, mask).sum(dim, keepdim=True) / count
    squares = masked_sum((masked_fill(x, mask) - mean).square(), mask, dim)
    return squares / (count.reshape(squares.shape) - int(unbiased)).clamp(min=1)


def _count(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None, keepdim: bool = False) -> Tensor:
    return mask.expand_as(x).sum(dim, keepdim=keepdim).to(x.dtype)


def accumulator(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def group_index(group: Tensor) -> tuple[Tensor, int]:
    """Renumbers arbitrary ids [B] as 0 … n−1. Returns (inverse [B] int64, n). Rows may come in any order."""
    ids, inverse = torch.unique(group, return_inverse=True)
    return inverse, ids.numel()


def group_sum(x: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Sums of valid rows by group.

    x: [B] or [B, C]; group: [B] ids; valid: [B] bool. Returns [n] or [n, C] in float64, in the order of
    ``group_index``, so ``group_sum(x, group, valid)[group_index(group)[0]]`` is each row's group total.
    """
    inverse, groups = group_index(group)
    return _sum_by(x, inverse, groups, valid)


def leave_one_out_sum(x: Tensor, group: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the other valid rows of a row's group, and how many there are.

    x: [B] or [B, C]. Returns (sum in float64 with the shape of x, count [B] float64).
    """
    inverse, groups = group_index(group)
    own = masked_fill(x, _rows(valid, x)).to(accumulator(x))
    members = _sum_by(torch.ones_like(own[:, 0] if own.dim() == 2 else own), inverse, groups, valid)
    return _sum_by(x, inverse, groups, valid)[inverse] - own, members[inverse] - valid.to(members.dtype)


def leave_one_out_mean(x: Tensor, group: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the OTHER valid rows of a row's group (Kool et al. 2019; Ahmadian et al. 2024, §2.3).

    x: [B] or [B, C]; group: [B] ids, groups of any sizes; valid: [B] bool. Returns (mean, of the shape and dtype of x,
    0 where there is no other valid row; has_others [B] bool).
    """
    total, count = leave_one_out_sum(x, group, valid)
    has_others = count > 0
    mean = total / _rows(count.clamp(min=1), x)
    return masked_fill(mean, _rows(has_others, x)).to(x.dtype), has_others


def first_stop(ids: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Column of the first stop token of each row [B] int64; C where the row has none. ids: [B, C]."""
    stops = torch.isin(ids, torch.tensor(list(stop_ids), dtype=ids.dtype, device=ids.device))
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    padded = torch.nn.functional.pad(torch.where(stops, columns, ids.shape[1]), (0, 1), value=ids.shape[1])
    return padded.amin(1)


def completion_mask(ids: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens belong to the completion: everything up to and including the first stop token.

    ids: [B, C]. Returns (mask [B, C] bool, finished [B] bool: the row has a stop token). The stop token counts: it is
    an action of the policy, and stopping must be learned.
    """
    stop = first_stop(ids, stop_ids)
    columns = torch.arange(ids.shape[1], device=ids.device)
    return columns <= stop[:, None], stop < ids.shape[1]


def _sum_by(x: Tensor, inverse: Tensor, groups: int, valid: Tensor) -> Tensor:
    kept = masked_fill(x, _rows(valid, x)).to(accumulator(x))
    return kept.new_zeros((groups, *kept.shape[1:])).index_add(0, inverse, kept)


def _rows(per_row: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1] where ``like`` has a token axis."""
    return per_row[:, None] if like.dim() == 2 else per_row
