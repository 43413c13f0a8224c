"""How completions are laid out as model rows. A layout decides what shares a row; statistics come back as [B, C]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.rollout import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Model inputs, and where each completion token's statistics come from and go to.

    input_ids      [R, L] int64
    attention_mask [R, L] int64, 1 = a real token; None = what shares a row is told apart by restarting positions
    position_ids   [R, L] int64, 0 at the first real token of a row
    source         [n] int64: flat index into R·L of the position whose hidden state predicts the token
    target         [n] int64: the token predicted there
    place          [n] int64: flat index into B·C where its statistics belong
    shape          (B, C)
    segments       [R, L] int64 where completions share a row's beginning (``models.masks.tree``), else None
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    source: Tensor
    target: Tensor
    place: Tensor
    shape: tuple[int, int]
    segments: Tensor | None = None


class Size(NamedTuple):
    """What a forward holds: rows (completions), its longest prompt and completion, its real tokens with a prompt for
    every row; units (groups, pairs), and the longest of them with its prompt once."""

    rows: int
    prompt: int
    completion: int
    tokens: int
    units: int
    longest: int

    @classmethod
    def of(cls, prompts: Sequence[int], completions: Sequence[int]) -> Size:
        """Of one unit, by the lengths of its rows."""
        total = sum(completions)
        longest = max(prompts) + total
        return cls(len(prompts), max(prompts), max(completions), sum(prompts) + total, 1, longest)

    def joined(self, other: Size) -> Size:
        most = max(self.prompt, other.prompt), max(self.completion, other.completion)
        rows, tokens, units = self.rows + other.rows, self.tokens + other.tokens, self.units + other.units
        return Size(rows, *most, tokens, units, max(self.longest, other.longest))


Cost = Callable[[Size], int]


class Layout(Protocol):
    def __call__(self, batch: TokenBatch) -> Rows: ...

    def cells(self, size: Size) -> int:
        """What a forward that holds so much costs, in tokens: R·L, or nearly that where rows are packed."""


@dataclass(frozen=True)
class PlainRows:
    """One row per completion: left-padded prompt, right-padded completion."""

    def cells(self, size: Size) -> int:
        return size.rows * (size.prompt + size.completion)

    def __call__(self, batch: TokenBatch) -> Rows:
        """Raises ValueError where a prompt is empty: nothing would predict the first token (render at least a BOS)."""
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


plain_rows = PlainRows()


@dataclass(frozen=True)
class SharedPrompts:
    """One row a group: the prompt once, its completions behind it one after the other, each blind to the others.

    What that saves is the prompt's k − 1 repetitions and the padding to the longest completion. Where it would not save
    a tenth of the cells, where a row would exceed ``row_tokens`` (masks are quadratic in it) or where a group's prompts
    differ (no rollout has such groups, and ``cells`` does not look), rows are plain. The choice is a function of the
    batch alone: policy and reference make the same one.
    """

    row_tokens: int = 4096

    def cells(self, size: Size) -> int:
        plain, shared = plain_rows.cells(size), size.units * size.longest
        return shared if self._worth(plain, shared, size.longest) else plain

    def _worth(self, plain: int, shared: int, longest: int) -> bool:
        return 10 * shared <= 9 * plain and longest <= self.row_tokens

    def __call__(self, batch: TokenBatch) -> Rows:
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(batch.group.tolist()):
            groups.setdefault(group, []).append(row)
        prompt, completion = batch.prompt_mask.sum(1).tolist(), batch.completion_mask.sum(1).tolist()
        widths = [prompt[rows[0]] + sum(completion[row] for row in rows) for rows in groups.values()]
        longest = max(widths, default=0)
        plain = len(batch) * (batch.prompt_ids.shape[1] + batch.completion_ids.shape[1])
        worth = self._worth(plain, len(groups) * longest, longest)
        if not worth or not _same_prompts(batch, list(groups.values())):
            return plain_rows(batch)
        return _shared(batch, list(groups.values()), prompt, completion, longest)


def _same_prompts(batch: TokenBatch, groups: list[list[int]]) -> bool:
    """Whether every group has one prompt, and that has a token."""
    first = torch.zeros_like(batch.group)
    for rows in groups:
        first[rows] = rows[0]
    same = (batch.prompt_ids == batch.prompt_ids[first]) | ~batch.prompt_mask
    return bool((same & (batch.prompt_mask == batch.prompt_mask[first])).all() and batch.prompt_mask.any(dim=1).all())


def _shared(batch: TokenBatch, groups: list[list[int]], prompt: list[int], completion: list[int], width: int) -> Rows:
    device, shape = batch.group.device, (len(groups), width)
    places = _places(groups, prompt, completion, len(batch)).to(device)
    heads = torch.tensor([rows[0] for rows in groups], device=device)
    ids, segments, positions = (batch.group.new_full(shape, fill) for fill in (0, -1, 0))
    real = batch.prompt_mask[heads]
    owner, _ = real.nonzero(as_tuple=True)
    column = (real.cumsum(1) - 1)[real]
    ids[owner, column], segments[owner, column], positions[owner, column] = batch.prompt_ids[heads][real], 0, column
    which, step = batch.completion_mask.nonzero(as_tuple=True)
    at, begin, member = places[:, which]
    targets, there, length = batch.completion_ids[which, step], begin + step, batch.prompt_mask.sum(1)[which]
    ids[at, there], segments[at, there], positions[at, there] = targets, member, length + step
    before = torch.where(step == 0, length, there) - 1  # the first token is predicted by the prompt's last
    return Rows(
        input_ids=ids,
        attention_mask=None,
        position_ids=positions,
        source=at * width + before,
        target=targets,
        place=which * batch.completion_ids.shape[1] + step,
        shape=(len(batch), batch.completion_ids.shape[1]),
        segments=segments,
    )


def _places(groups: list[list[int]], prompt: list[int], completion: list[int], size: int) -> Tensor:
    """[3, B] of each completion: its row, its first column there, its number within the group (from 1)."""
    found = torch.zeros(3, size, dtype=torch.long)
    for row, members in enumerate(groups):
        column = prompt[members[0]]
        for number, index in enumerate(members, start=1):
            found[:, index] = torch.tensor([row, column, number])
            column += completion[index]
    return found


@dataclass(frozen=True)
class PackedRows:
    """Several completions in one row, one after the other, each blind to the others; next to no padding.

    row_tokens: width of a row; one longer completion makes all rows as wide as itself. Positions restart at 0, and
    without an attention mask transformers reads from them where a sequence begins (it has that for packed training).
    """

    row_tokens: int = 2048

    def cells(self, size: Size) -> int:
        return size.tokens

    def __call__(self, batch: TokenBatch) -> Rows:
        """Raises ValueError where a prompt is empty, as ``plain_rows`` does."""
        if len(batch) and not bool(batch.prompt_mask.any(dim=1).all()):
            raise ValueError("every prompt needs at least one token, or nothing predicts the completion's first")
        device, lengths = batch.group.device, batch.lengths.tolist()
        width = max([*lengths, min(self.row_tokens, sum(lengths))])
        starts = torch.tensor(_first_fit(lengths, width), dtype=torch.long, device=device)  # flat, into R·L
        real = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        offsets = (real.cumsum(1) - 1).clamp_min(0)
        places = (starts[:, None] + offsets)[real]
        rows, columns = batch.completion_mask.nonzero(as_tuple=True)
        height = (int(starts.max()) // width + 1) if len(batch) else 0
        source = starts[rows] + batch.prompt_mask.sum(1)[rows] - 1 + columns
        return Rows(
            input_ids=ids.new_zeros(height * width).scatter(0, places, ids[real]).view(height, width),
            attention_mask=None,
            position_ids=offsets.new_zeros(height * width).scatter(0, places, offsets[real]).view(height, width),
            source=source,
            target=batch.completion_ids[rows, columns],
            place=rows * batch.completion_ids.shape[1] + columns,
            shape=(len(batch), batch.completion_ids.shape[1]),
        )


def _first_fit(lengths: list[int], width: int) -> list[int]:
    """Flat start of every sequence in rows of ``width``: longest first, each into the first row with room for it."""
    used: list[int] = []
    starts = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        row = next((row for row, taken in enumerate(used) if taken + lengths[index] <= width), len(used))
        if row == len(used):
            used.append(0)
        starts[index] = row * width + used[row]
        used[row] += lengths[index]
    return starts
