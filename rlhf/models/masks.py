"""Attention masks of our own: who sees whom, in the form that a model family and its attention kernel take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Families whose kinds of masks are known here. Others build theirs from a plain padding mask.
FAMILIES = frozenset({"gemma", "gemma2", "gemma3_text"})
KERNELS = frozenset({"sdpa", "eager"})

Masks = Tensor | dict[str, Tensor]


def known(model: Any) -> bool:
    """Whether a transformers model takes masks from here."""
    config = model.config.get_text_config()
    return config.model_type in FAMILIES and config._attn_implementation in KERNELS


def masks(model: Any, allowed: Tensor, distance: Tensor) -> Masks:
    """allowed [·, 1, q, k] bool: whether a query may see a key at all; distance, of that shape: how many positions
    earlier the key stands, for layers with a window. One 4-D mask, or one for each kind of layer."""
    config = model.config.get_text_config()
    if config.model_type == "gemma":
        return _as_taken(model, allowed)
    near = allowed & (distance < config.sliding_window)
    return {"full_attention": _as_taken(model, allowed), "sliding_attention": _as_taken(model, near)}


def tree(segments: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(allowed, distance) [R, 1, L, L] of rows in which several continuations follow one beginning.

    segments [R, L]: 0 = the beginning, j = the j-th continuation, −1 = padding, which sees itself alone (a query that
    sees nothing would be NaN). A token sees what stands before it in the beginning and in its own continuation.
    """
    width = segments.shape[1]
    at = torch.arange(width, device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = (at[None, :, None] >= at[None, None, :]) & ((key == 0) | (key == query)) & (query >= 0)
    allowed = allowed | torch.eye(width, dtype=torch.bool, device=segments.device)
    distance = positions[:, :, None] - positions[:, None, :]
    return allowed[:, None], distance[:, None]


def _as_taken(model: Any, allowed: Tensor) -> Tensor:
    """Boolean, or what eager attention adds."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return allowed
    dtype = model.dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
