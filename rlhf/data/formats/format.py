"""What a format of rows is. One format is one small object; rlhf/data/formats/table.py lists ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from rlhf.rollout import Turn

Row = Mapping[str, Any]
Asked = str | tuple[Turn, ...]  # what a completion answers: plain text that no template touches, or a conversation
Rows = Sequence[tuple[int, Row]]  # (row id, row)
Drop = Callable[[int, str], None]  # (row id, reason)
Use = Literal["prompts", "demonstrations", "preferences"]
T = TypeVar("T")

# Columns that are rows' text in one format or another: never handed to reward functions as extra columns.
TEXT_COLUMNS = frozenset({"messages", "prompt", "chosen", "rejected", "completion", "text"})


class BadRow(Exception):
    """Why one row cannot be used. It is counted, with the place of the first row of each reason."""


class Reply(NamedTuple):
    """A completion to imitate, and what it answers."""

    asked: Asked
    completion: str


class Pair(NamedTuple):
    """Two completions of one prompt, the better one first, and by how much where that is known."""

    asked: Asked
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class Format:
    """One shape of rows. A subclass overrides what its rows can serve: ``prompt``, ``demonstration``, ``preference``.

    name: what ``data.*.format`` calls it. columns: what a row must have to be recognised. also: other columns that it
    reads. cut: its prompts are whole texts, of which the first ``data.prompt_tokens`` tokens are the prompt. chat: a
    prompt that is a string is one user turn.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    also: ClassVar[tuple[str, ...]] = ()
    cut: ClassVar[bool] = False

    chat: bool = False

    def recognises(self, row: Row) -> bool:
        """Whether the row looks like this format; a format with common columns looks at what they hold, too."""
        return all(row.get(column) is not None for column in self.columns)

    def prompt(self, row: Row) -> Asked:
        """What a completion is sampled for. Raises BadRow."""
        raise NotImplementedError

    def demonstration(self, row: Row) -> Reply:
        """A completion to imitate. Raises BadRow."""
        raise NotImplementedError

    def preference(self, row: Row) -> Pair:
        """Two completions to compare. Raises BadRow."""
        raise NotImplementedError

    def extras(self, row: Row) -> dict[str, Any]:
        """The columns that reward functions receive by name."""
        return {key: value for key, value in row.items() if key not in TEXT_COLUMNS and key not in self._reads}

    def prompts(self, rows: Rows, drop: Drop) -> Iterator[tuple[int, Asked]]:
        """(row id, prompt): one of each row."""
        return each(rows, self.prompt, drop)

    def preferences(self, rows: Rows, drop: Drop, seed: int, epoch: int) -> Iterator[tuple[int, Pair]]:
        """(row id, pair): one of each row, unless the format makes a pair of two rows."""
        return each(rows, self.preference, drop)

    def serves(self, use: Use) -> bool:
        """Whether the rows can be used for this: whether the subclass says how."""
        own = type(self)
        if use == "preferences":
            return own.preference is not Format.preference or own.preferences is not Format.preferences
        return own.prompt is not Format.prompt if use == "prompts" else own.demonstration is not Format.demonstration

    @property
    def _reads(self) -> tuple[str, ...]:
        return (*self.columns, *self.also)

    def __str__(self) -> str:
        return f"{self.name} ({' + '.join(self.columns)})"


@dataclass(frozen=True)
class Compared(Format):
    """Rows that are pairs first of all: the prompt is the pair's, and the better reply is what to imitate."""

    def prompt(self, row: Row) -> Asked:
        return self.preference(row).asked

    def demonstration(self, row: Row) -> Reply:
        pair = self.preference(row)
        return Reply(pair.asked, pair.chosen)


def each(rows: Rows, convert: Callable[[Row], T], drop: Drop) -> Iterator[tuple[int, T]]:
    """(row id, what ``convert`` makes of the row); rows that it refuses are dropped with its reason."""
    for row_id, row in rows:
        try:
            yield row_id, convert(row)
        except BadRow as bad:
            drop(row_id, str(bad))
        except KeyError as missing:  # a column that other rows have and this one lacks
            drop(row_id, f"no column {missing}")


def text_of(value: Any, column: str) -> str:
    """The text of a cell. Raises BadRow where there is none."""
    if value is None:
        raise BadRow(f"no column {column!r}")
    if not isinstance(value, str):
        raise BadRow(f"{column} is not text")
    if not value.strip():
        raise BadRow(f"{column} is empty")
    return value


def number(value: Any, column: str) -> float:
    """A rating: a number, or text that is one (every cell of a CSV file is text). Raises BadRow."""
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if found - found != 0.0:
        raise BadRow(f"{column} is not a number")
    return found


def better(first: Reply, second: Reply, margin: float | None) -> Pair:
    """A pair of two replies to one prompt. Raises BadRow for pairs that say nothing."""
    if first.asked != second.asked:
        raise BadRow("chosen and rejected answer different conversations")
    if first.completion == second.completion:
        raise BadRow("chosen and rejected are the same")
    if margin is not None and margin <= 0:
        raise BadRow("chosen is not rated above rejected")
    return Pair(first.asked, first.completion, second.completion, margin)
