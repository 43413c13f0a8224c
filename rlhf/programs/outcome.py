"""What a policy run changed on held-out prompts: paired differences of before and after, and samples side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.tracking.records import read_rows


@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired difference. error: standard error of the mean difference over prompts."""

    before: float
    after: float
    error: float
    prompts: int

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """changes: score name → paired change (``reward`` = what was trained on, ``kl``, ``tokens`` and every source).
    pairs: (before, after) rows of samples.jsonl for the same prompt and the same noise."""

    changes: Mapping[str, Change]
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def outcome(run: Path) -> Outcome | None:
    """Reads samples.jsonl; None where the run evaluated nothing before and after."""
    return compare(read_rows(run / "samples.jsonl")[0])


def compare(rows: Sequence[Mapping[str, Any]]) -> Outcome | None:
    """Pairs the rows of phases ``before`` and ``after`` by slot, or by prompt where rows have no slot."""
    # a run killed after its last evaluation writes it again when resumed: the last row of a slot counts
    before = {_slot(row): row for row in rows if row.get("phase") == "before"}
    after = {_slot(row): row for row in rows if row.get("phase") == "after"}
    pairs = [(row, after[slot]) for slot, row in before.items() if slot in after]
    if not pairs:
        return None
    names = ["reward", "kl", "tokens", *(pairs[0][0].get("scores") or {})]
    found = {name: _change([(_value(b, name), _value(a, name)) for b, a in pairs]) for name in names}
    return Outcome(changes={name: change for name, change in found.items() if change is not None}, pairs=pairs)


def _slot(row: Mapping[str, Any]) -> str:
    return str(row["slot"] if "slot" in row else row.get("prompt"))


def _value(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name) if name in ("reward", "kl", "tokens") else (row.get("scores") or {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def _change(values: Sequence[tuple[float | None, float | None]]) -> Change | None:
    both = [(b, a) for b, a in values if b is not None and a is not None]
    if len(both) < 2:
        return None
    differences = [a - b for b, a in both]
    mean = sum(differences) / len(both)
    spread = sum((d - mean) ** 2 for d in differences) / (len(both) - 1)
    return Change(
        before=sum(b for b, _ in both) / len(both),
        after=sum(a for _, a in both) / len(both),
        error=math.sqrt(spread / len(both)),
        prompts=len(both),
    )


def show(found: Outcome | None, samples: int = 4) -> None:
    """Prints the changes as a table and a few prompts with both completions. Model text is escaped."""
    if found is None:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rlhf.tracking.console import printable

    table = Table(title="held-out prompts, before → after (± standard error of the paired difference)")
    for column in ("", "before", "after", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    for name, change in found.changes.items():
        difference = f"{change.difference:+.3f} ± {change.error:.3f}"
        table.add_row(name, f"{change.before:.3f}", f"{change.after:.3f}", difference)
    console = Console(soft_wrap=True)
    console.print(table)
    for before, after in found.pairs[:samples]:
        console.print(Text(f"\n{printable(before['prompt'])}", style="bold"))
        console.print(Text(f"  before: {printable(before['completion'])}"))
        console.print(Text(f"  after:  {printable(after['completion'])}"))
