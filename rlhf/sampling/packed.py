"""Attention of one new token a row, in which the query heads that share a key head are rows of one product.

transformers before 5.24, and its eager attention in any version, repeat keys and values for every query head at every
token: of a long prompt that is most of what a step of decoding moves. Here [R, heads, 1, D] queries are read as
[R, key heads, heads / key heads, D], and keys and values are taken as they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface


def _sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    found = functional.scaled_dot_product_attention(_packed(query, key), key, value, attn_mask=mask, scale=scaling)
    return _unpacked(found), None


def _eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = module.head_dim**-0.5 if scaling is None else scaling
    scores = torch.matmul(_packed(query, key), key.transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores if mask is None else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return _unpacked(torch.matmul(weights, value)), None


def _packed(query: Tensor, key: Tensor) -> Tensor:
    """[R, heads, 1, D] → [R, key heads, heads / key heads, D]: heads that share a key head lie side by side."""
    rows, _, _, width = query.shape
    return query.reshape(rows, key.shape[1], -1, width)


def _unpacked(found: Tensor) -> Tensor:
    """→ [R, 1, heads, D], which is how transformers takes what an attention function found."""
    return found.reshape(len(found), 1, -1, found.shape[-1])


_NAMES = {"sdpa": "rlhf_sdpa_one_token", "eager": "rlhf_eager_one_token"}
AttentionInterface.register(_NAMES["sdpa"], _sdpa)
AttentionInterface.register(_NAMES["eager"], _eager)


@contextmanager
def one_token(config: Any) -> Iterator[None]:
    """Inside, a model of this (text) configuration attends for one new token a row; masks are what they were."""
    own = config._attn_implementation
    config._attn_implementation = _NAMES[own]
    try:
        yield
    finally:
        config._attn_implementation = own
