"""Values from anywhere → rows: objects with named columns, finite numbers and real text. The others are counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf.data.dropped import Dropped

Row = dict[str, Any]
PlacedRow = tuple[str, Row]


class NotARow(Exception):
    """Why a line of a file is no row; read in place of the row and counted. ``detail`` is told for the first one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def checked(numbered: Iterable[tuple[int, Any]], place: str, dropped: Dropped) -> Iterator[PlacedRow]:
    """(place, row) of the numbered values that can be rows; the others are counted at ``place`` + number."""
    for number, value in numbered:
        here = f"{place}{number}"
        if isinstance(value, NotARow):
            dropped.add(value.reason, f"{here}: {value.detail}" if value.detail else here)
        elif not isinstance(value, Mapping):
            dropped.add("not an object with named columns", f"{here}: {type(value).__name__}")
        elif reason := flaw(value):
            dropped.add(reason, here)
        else:
            yield here, dict(value)


def flaw(value: Any) -> str | None:
    """What no later step could work with, anywhere in the value: NaN, NUL, text that no encoding can write."""
    try:
        return _flaw(value)
    except RecursionError:
        return "nested too deeply"


def _flaw(value: Any) -> str | None:
    kind = type(value)  # exact types first: this sees every value of every row
    if kind is str:
        return _flaw_of_text(value)
    if kind is float:
        return None if value - value == 0.0 else "NaN or Infinity in the row"
    if kind is int or kind is bool or value is None:
        return None
    if kind is dict or isinstance(value, Mapping):
        value = (*value, *value.values())
    elif kind is not list and not isinstance(value, tuple):
        return None
    for entry in value:
        if reason := _flaw(entry):
            return reason
    return None


def _flaw_of_text(text: str) -> str | None:
    if "\0" in text:
        return "a NUL character in the row"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "half of a surrogate pair in the row"  # "\ud83d" without its second half; tokenizers refuse it
    return None
