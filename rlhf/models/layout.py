"""How completions are laid out as model rows. A layout decides what shares a row; statistics come back as [B, C]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.rollout import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Model inputs, and where each completion token's statistics come from and go to.

    input_ids      [R, L] int64
    attention_mask [R, L] int64, 1 = a real token
    position_ids   [R, L] int64, 0 at the first real token of a row
    source         [n] int64: flat index into R·L of the position whose hidden state predicts the token
    target         [n] int64: the token predicted there
    place          [n] int64: flat index into B·C where its statistics belong
    shape          (B, C)
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    source: Tensor
    target: Tensor
    place: Tensor
    shape: tuple[int, int]


class Layout(Protocol):
    def __call__(self, batch: TokenBatch) -> Rows: ...


def plain_rows(batch: TokenBatch) -> Rows:
    """One row per completion: left-padded prompt, right-padded completion.

    Raises ValueError where a prompt is empty: nothing would predict the first token (render at least a BOS).
    """
    if len(batch) and not bool(batch.prompt_mask.any(dim=1).all()):
        raise ValueError("every prompt needs at least one token, or nothing predicts the completion's first")
    input_ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).long()
    rows, columns = batch.completion_mask.nonzero(as_tuple=True)
    width, prompt_width = input_ids.shape[1], batch.prompt_ids.shape[1]
    return Rows(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        source=rows * width + prompt_width - 1 + columns,
        target=batch.completion_ids[rows, columns],
        place=rows * batch.completion_ids.shape[1] + columns,
        shape=(len(batch), batch.completion_ids.shape[1]),
    )
