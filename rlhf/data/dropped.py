"""The account of rows that could not be used: how many, why, and one example of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Where = Callable[[int], str]  # row id → the place a user can look at


def row_number(row_id: int) -> str:
    return f"row {row_id}"


@dataclass
class Dropped:
    """Counts rows by reason and keeps the first place each reason was met at (``train.jsonl:17`` or ``row 17``)."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        """One line per reason, most frequent first: ``empty turn: 12 (first: row 3)``."""
        return [f"{reason}: {count} (first: {self.examples[reason]})" for reason, count in self.counts.most_common()]
