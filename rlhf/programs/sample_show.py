"""How ``rlhf sample`` shows completions: panels on a terminal, plain lines elsewhere, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from rlhf.programs.sample import Completion, Sample
from rlhf.tracking.console import printable


def show(found: Sequence[Sample], run: str, start: str | None) -> None:
    """run: what the run is called; start: what the model it started from is called. Texts of models are escaped."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        for line in plain_lines(found, run, start):
            console.print(Text(line))
        return
    wide = Console(markup=False, highlight=False)
    for sample in found:
        sides = [_panel(side, name) for side, name in _sides(sample, run, start)]
        wide.print(Text(f"\n{printable(sample.prompt)}", style="bold"), Group(*sides), sep="\n")


def plain_lines(found: Sequence[Sample], run: str, start: str | None) -> Iterator[str]:
    """``prompt: …`` once, and below it each completion on one line, its facts in front."""
    last: str | None = None
    for sample in found:
        if sample.prompt != last or sample.number == 0:
            yield f"prompt: {printable(sample.prompt, newlines=False)}"
            last = sample.prompt
        for side, name in _sides(sample, run, start):
            yield f"  {name} ({facts(side)}): {printable(side.text, newlines=False)}"


def json_lines(found: Sequence[Sample], run: str, start: str | None) -> Iterator[str]:
    """One object a sample, in ASCII: {"run", "prompt", "sample", "completion", "tokens", "finished", "scores"}, and the
    same facts of the other model under "start"."""
    for sample in found:
        row: dict[str, Any] = {"run": run, "prompt": sample.prompt, "sample": sample.number, **_facts(sample.run)}
        if sample.start is not None:
            row["start"] = {"model": start, **_facts(sample.start)}
        yield json.dumps(row, allow_nan=False)


def facts(side: Completion) -> str:
    """``12 tokens, gold 1.25``; a completion that did not end by itself says so."""
    scores = [f"{name} {'unscorable' if score is None else f'{score:.4g}'}" for name, score in side.scores.items()]
    return ", ".join([f"{side.tokens} tokens", *([] if side.finished else ["cut"]), *scores])


def _sides(sample: Sample, run: str, start: str | None) -> list[tuple[Completion, str]]:
    sides = [] if sample.start is None else [(sample.start, start or "start")]
    return [*sides, (sample.run, run)]


def _facts(side: Completion) -> Mapping[str, Any]:
    values = asdict(side)
    return {"completion": values.pop("text"), **values}


def _panel(side: Completion, name: str) -> Panel:
    return Panel(Text(printable(side.text)), title=Text(name), subtitle=Text(facts(side)), title_align="left")
