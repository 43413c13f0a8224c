"""Splitting a batch into forwards by token budget. A unit (group, pair) is never split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.interfaces import Collective, TokenStats
from rlhf.rollout import TokenBatch


@dataclass(frozen=True)
class Microbatch:
    """rows: positions in the batch it was cut from, [b] int64. filler: takes part with weight 0 so that every rank
    runs the same number of forwards and backwards."""

    batch: TokenBatch
    rows: Tensor
    filler: bool = False


class Size(NamedTuple):
    """What a microbatch holds: its rows, its longest prompt and completion, and its real tokens."""

    rows: int
    prompt: int
    completion: int
    tokens: int

    def joined(self, other: Size) -> Size:
        longest = max(self.prompt, other.prompt), max(self.completion, other.completion)
        return Size(self.rows + other.rows, *longest, self.tokens + other.tokens)


Cost = Callable[[Size], int]


def padded_tokens(size: Size) -> int:
    """Tokens of a forward that pads every row to the longest."""
    return size.rows * (size.prompt + size.completion)


def real_tokens(size: Size) -> int:
    """Tokens of a forward that packs its rows."""
    return size.tokens


def split(
    batch: TokenBatch, budget_tokens: int, collective: Collective | None = None, cost: Cost = padded_tokens
) -> list[Microbatch]:
    """Longest units first, greedily packed while their ``cost`` in tokens stays within ``budget_tokens``.

    A single unit larger than the budget is a microbatch of its own. Every rank gets the same number of microbatches
    (the largest over ranks), the missing ones as fillers. The split is a pure function of the lengths and groups.
    """
    cuts = _pack(_units(batch), batch.prompt_mask.sum(1), batch.completion_mask.sum(1), budget_tokens, cost)
    microbatches = [Microbatch(batch.select(rows), rows) for rows in cuts]
    if collective is not None and collective.world_size > 1:
        count = torch.tensor(len(microbatches), device=batch.group.device)
        missing = int(collective.max(count)) - len(microbatches)
        microbatches += [_filler(microbatches[-1]) for _ in range(missing)]
    return microbatches


def _units(batch: TokenBatch) -> list[list[int]]:
    """Row indices of each unit, in order of first appearance."""
    units: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group.tolist()):
        units.setdefault(group, []).append(row)
    return list(units.values())


def _pack(units: list[list[int]], prompts: Tensor, completions: Tensor, budget: int, cost: Cost) -> list[Tensor]:
    p, c = prompts.tolist(), completions.tolist()
    sized = [(_size([p[row] for row in unit], [c[row] for row in unit]), unit) for unit in units]
    sized.sort(key=lambda item: (-(item[0].prompt + item[0].completion), item[1][0]))  # ties by position: reproducible
    cuts: list[list[int]] = []
    held = Size(0, 0, 0, 0)
    for size, unit in sized:
        if cuts and cost(held.joined(size)) <= budget:
            cuts[-1].extend(unit)
            held = held.joined(size)
        else:
            cuts.append(list(unit))
            held = size
    return [torch.tensor(rows, dtype=torch.long) for rows in cuts]


def _size(prompts: list[int], completions: list[int]) -> Size:
    return Size(len(prompts), max(prompts), max(completions), sum(prompts) + sum(completions))


def _filler(like: Microbatch) -> Microbatch:
    first = like.batch.select(torch.nonzero(like.batch.group == like.batch.group[0])[:, 0])
    return Microbatch(replace(first, valid=torch.zeros_like(first.valid)), like.rows[:0], filler=True)


@dataclass
class Collected:
    """Puts microbatch statistics back into the row order of the batch they were cut from.

    rows, width: the batch's B and C. Statistics are detached; columns beyond a microbatch's width stay 0.
    """

    rows: int
    width: int
    columns: dict[str, Tensor] = field(default_factory=dict)

    def add(self, microbatch: Microbatch, stats: TokenStats) -> None:
        if microbatch.filler:
            return
        for name, value in stats._asdict().items():
            if value is not None and value.numel():  # a reward model has no token statistics
                self._place(name, microbatch.rows.to(value.device), value.detach())

    def _place(self, name: str, rows: Tensor, value: Tensor) -> None:
        per_row = value.dim() == 1
        target = self.columns.setdefault(name, value.new_zeros((self.rows,) if per_row else (self.rows, self.width)))
        if per_row:
            target[rows] = value
        else:
            target[rows, : value.shape[1]] = value

    def stats(self) -> TokenStats:
        return TokenStats(**{"logprobs": torch.zeros(0), **self.columns})


@torch.no_grad()
def score(
    batch: TokenBatch,
    forward: Callable[[TokenBatch], TokenStats],
    budget_tokens: int,
    collective: Collective | None = None,
) -> TokenStats:
    """Statistics of a whole batch without gradient, cut exactly as an update would cut it.

    The same cut matters: two forwards of one model agree to the last bit only in one layout, and the KL of a policy
    that has not moved must be exactly 0.
    """
    collected = Collected(len(batch), batch.completion_ids.shape[1])
    for microbatch in split(batch, budget_tokens, collective):
        collected.add(microbatch, forward(microbatch.batch))
    return collected.stats()
