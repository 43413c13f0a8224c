"""Splitting a batch into forwards by token budget. A unit (group, pair) is never split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from rlhf.interfaces import Collective, TokenStats
from rlhf.models.layout import Cost, Size, plain_rows
from rlhf.rollout import TokenBatch


@dataclass(frozen=True)
class Microbatch:
    """rows: positions in the batch it was cut from, [b] int64. filler: takes part with weight 0 so that every rank
    runs the same number of forwards and backwards."""

    batch: TokenBatch
    rows: Tensor
    filler: bool = False


@dataclass(frozen=True)
class Microbatches(Sequence[Microbatch]):
    """A batch cut up; each part is copied out when it is asked for, so that no second copy of the batch is held.

    cuts: the rows of each. fillers: how many follow.
    """

    batch: TokenBatch
    cuts: Sequence[Tensor]
    fillers: int = 0

    def __len__(self) -> int:
        return len(self.cuts) + self.fillers

    @overload
    def __getitem__(self, at: int) -> Microbatch: ...

    @overload
    def __getitem__(self, at: slice) -> list[Microbatch]: ...

    def __getitem__(self, at: int | slice) -> Microbatch | list[Microbatch]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        rows = self.cuts[min(place, len(self.cuts) - 1)]
        part = Microbatch(self.batch.select(rows), rows)
        return part if place < len(self.cuts) else _filler(part)


def split(
    batch: TokenBatch, budget_tokens: int, collective: Collective | None = None, cost: Cost = plain_rows.cells
) -> Microbatches:
    """Units packed by ``pack``: a pure function of the lengths and groups.

    Every rank gets the same number of microbatches (the largest over ranks), the missing ones as fillers.
    """
    prompts, completions, units = (
        batch.prompt_mask.sum(1).tolist(),
        batch.completion_mask.sum(1).tolist(),
        _units(batch),
    )
    sizes = [Size.of([prompts[row] for row in unit], [completions[row] for row in unit]) for unit in units]
    cuts = [torch.tensor([row for at in cut for row in units[at]]) for cut in pack(sizes, budget_tokens, cost)]
    if collective is None or collective.world_size == 1:
        return Microbatches(batch, cuts)
    count = torch.tensor(len(cuts), device=batch.group.device)
    return Microbatches(batch, cuts, fillers=int(collective.max(count)) - len(cuts))


def pack(sizes: Sequence[Size], budget_tokens: int, cost: Cost) -> list[list[int]]:
    """Indices of the sizes by forward: widest first, while their joint ``cost`` in tokens stays within the budget.

    A single one beyond the budget has a forward of its own. A forward is also closed where the next one would cost a
    seventh more in it than alone, once it holds a sixteenth of the budget: padding is work too.
    """
    order = sorted(range(len(sizes)), key=lambda at: (-cost(sizes[at]) / sizes[at].rows, at))  # ties: reproducible
    cuts: list[list[int]] = []
    held = Size(0, 0, 0, 0, 0, 0)
    for at in order:
        joined, alone = held.joined(sizes[at]), cost(sizes[at])
        padded = 7 * (cost(joined) - cost(held)) > 8 * alone and 16 * cost(held) >= budget_tokens
        if cuts and cost(joined) <= budget_tokens and not padded:
            cuts[-1].append(at)
            held = joined
        else:
            cuts.append([at])
            held = sizes[at]
    return cuts


def _units(batch: TokenBatch) -> list[list[int]]:
    """Row indices of each unit, in order of first appearance."""
    units: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group.tolist()):
        units.setdefault(group, []).append(row)
    return list(units.values())


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
    cost: Cost = plain_rows.cells,
) -> TokenStats:
    """Statistics of a whole batch without gradient, cut exactly as an update would cut it.

    The same cut matters: two forwards of one model agree to the last bit only in one layout, and the KL of a policy
    that has not moved must be exactly 0.
    """
    collected = Collected(len(batch), batch.completion_ids.shape[1])
    for microbatch in split(batch, budget_tokens, collective, cost):
        collected.add(microbatch, forward(microbatch.batch))
    return collected.stats()
