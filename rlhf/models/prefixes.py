"""Texts that begin alike in one row: their common beginning once, what follows it one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.rollout import pad_rows

TokenRow = Sequence[int]


@dataclass(frozen=True)
class PrefixRows:
    """input_ids, position_ids, segments [R, L] (``models.masks.tree``); last [n]: flat index into R·L of the last token
    of each text, group by group."""

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    last: Tensor

    def to(self, device: torch.device) -> PrefixRows:
        parts = (self.input_ids, self.position_ids, self.segments, self.last)
        return PrefixRows(*(part.to(device) for part in parts))


def common_prefix(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows begin with, short of the last token of the shortest: every text keeps one of its own."""
    longest = min(map(len, rows)) - 1
    low, high = min(rows, key=list), max(rows, key=list)  # what these two share, all rows between them share
    return next((at for at in range(longest) if low[at] != high[at]), longest)


def shared_length(rows: Sequence[TokenRow]) -> int:
    """Columns that the group takes up."""
    prefix = common_prefix(rows)
    return prefix + sum(len(row) - prefix for row in rows)


def share_prefixes(groups: Sequence[Sequence[TokenRow]]) -> PrefixRows:
    """One row a group of token rows, none of them empty."""
    laid = [_one_row(rows) for rows in groups]
    ids, _ = pad_rows([ids for ids, _, _, _ in laid], side="right")
    positions, _ = pad_rows([positions for _, positions, _, _ in laid], side="right")
    segments, _ = pad_rows([segments for _, _, segments, _ in laid], side="right", pad_id=-1)
    width = ids.shape[1]
    last = [row * width + column for row, (_, _, _, ends) in enumerate(laid) for column in ends]
    return PrefixRows(ids, positions, segments, torch.tensor(last, dtype=torch.long))


def _one_row(rows: Sequence[TokenRow]) -> tuple[list[int], list[int], list[int], list[int]]:
    """(ids, positions, segments, column of each text's last token)."""
    prefix = common_prefix(rows)
    ids, positions, segments = list(rows[0][:prefix]), list(range(prefix)), [0] * prefix
    ends = []
    for number, row in enumerate(rows, start=1):
        ids += row[prefix:]
        positions += range(prefix, len(row))
        segments += [number] * (len(row) - prefix)
        ends.append(len(ids) - 1)
    return ids, positions, segments, ends
