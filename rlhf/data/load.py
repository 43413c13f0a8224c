"""Sources of data → prompts, demonstrations or preferences, with an account of what was left out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf.data import formats
from rlhf.data.checked import Row
from rlhf.data.dropped import Dropped, Where
from rlhf.data.examples import Demonstration, Preference
from rlhf.data.formats.format import Format, Use
from rlhf.data.formats.table import find, require
from rlhf.data.limits import LongPrompts, within_length, without_unsupported_system
from rlhf.data.order import weighted_rows
from rlhf.data.read import read_placed_rows
from rlhf.errors import UserError
from rlhf.models.chat import SystemRole
from rlhf.rollout import Prompt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where rows come from. ``subset``: a hub data set's configuration. ``weight`` multiplies how often rows come in an
    epoch; ``columns``: our name → theirs."""

    path: str
    split: str = "train"
    subset: str | None = None
    format: str = "auto"
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)
    max_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What came of one source: rows read, examples made of them (before ``weight``), and what was dropped."""

    source: SourceSpec
    format: str
    read: int
    used: int
    dropped: Dropped

    def line(self) -> str:
        text = f"{self.source.path}: {self.used} of {self.read} rows used as {self.format}"
        return "; ".join([text, *self.dropped.lines()])


@dataclass(frozen=True)
class LoadReport:
    """One entry per source; ``lines()`` is what a program prints."""

    sources: tuple[SourceReport, ...]

    def lines(self) -> list[str]:
        return [source.line() for source in self.sources]


def load_prompts(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: Any = None,
    prompt_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
    long_prompts: LongPrompts = "drop",
    system_role: SystemRole = "error",
    seed: int = 0,
) -> tuple[list[Prompt], LoadReport]:
    """Prompts of all sources, one after the other; rows of weight 2 stand twice. ``row_id`` counts over all sources.

    ``tokenizer`` is needed for ``prompt_tokens`` and ``max_prompt_tokens``. Raises UserError for a source that cannot
    be read or has no usable row, and for system turns that the template refuses under ``system_role: error``.
    """

    def convert(rows: Sequence[Row], chosen: Format, first: int, dropped: Dropped, where: Where) -> list[Prompt]:
        found = formats.to_prompts(
            rows,
            format=chosen,
            dropped=dropped,
            tokenizer=tokenizer,
            prompt_tokens=prompt_tokens,
            first_row_id=first,
            where=where,
        )
        found = without_unsupported_system(found, tokenizer, system_role)
        # cut text is known to have prompt_tokens tokens and a BOS: encoding it once more would say nothing new
        short = chosen.cut and prompt_tokens is not None and prompt_tokens < (max_prompt_tokens or prompt_tokens + 1)
        if tokenizer is None or short:
            return found
        return within_length(found, tokenizer, max_prompt_tokens, long_prompts, dropped, where)

    return _load(sources, "prompts", convert, seed)


def load_demonstrations(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: Any = None,
    max_prompt_tokens: int | None = None,
    long_prompts: LongPrompts = "drop",
    system_role: SystemRole = "error",
    seed: int = 0,
) -> tuple[list[Demonstration], LoadReport]:
    """Demonstrations of all sources; see ``load_prompts``."""

    def convert(rows: Sequence[Row], chosen: Format, first: int, dropped: Dropped, where: Where) -> list[Demonstration]:
        found = formats.to_demonstrations(rows, format=chosen, dropped=dropped, first_row_id=first, where=where)
        prompts = without_unsupported_system([example.prompt for example in found], tokenizer, system_role)
        if tokenizer is not None:
            prompts = within_length(prompts, tokenizer, max_prompt_tokens, long_prompts, dropped, where)
        replies = {example.prompt.row_id: example.completion for example in found}
        return [Demonstration(prompt, replies[prompt.row_id]) for prompt in prompts]

    return _load(sources, "demonstrations", convert, seed)


def load_preferences(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: Any = None,
    max_prompt_tokens: int | None = None,
    long_prompts: LongPrompts = "drop",
    system_role: SystemRole = "error",
    seed: int = 0,
    epoch: int = 0,
) -> tuple[list[Preference], LoadReport]:
    """Pairs of all sources; see ``load_prompts``. Labelled text is paired anew for each ``epoch``."""

    def convert(rows: Sequence[Row], chosen: Format, first: int, dropped: Dropped, where: Where) -> list[Preference]:
        found = formats.to_preferences(
            rows, seed=seed, epoch=epoch, format=chosen, dropped=dropped, first_row_id=first, where=where
        )
        prompts = without_unsupported_system([pair.prompt for pair in found], tokenizer, system_role)
        if tokenizer is not None:
            prompts = within_length(prompts, tokenizer, max_prompt_tokens, long_prompts, dropped, where)
        pairs = {pair.prompt.row_id: pair for pair in found}
        return [_with_prompt(pairs[prompt.row_id], prompt) for prompt in prompts]

    return _load(sources, "preferences", convert, seed, epoch)


def load_labelled(sources: Sequence[SourceSpec], *, seed: int = 0) -> list[Demonstration]:
    """Every text of the sources that hold labelled text, with ``prompt.columns["label"]``; none of the others'."""
    found: list[Demonstration] = []
    for source in sources:
        rows = [row for _, row in _read(source, seed, Dropped())]
        found += formats.to_labelled(rows, format=source.format)
    return found


def training_texts(sources: Sequence[SourceSpec], seed: int = 0) -> Iterator[str]:
    """Every text in the sources, for training a tokenizer on them."""
    for source in sources:
        rows = [row for _, row in _read(source, seed, Dropped())]
        chosen = find(rows, source.format, source.path)
        for row in rows:
            yield from formats.texts(row, chosen)


def _with_prompt(pair: Preference, prompt: Prompt) -> Preference:
    return Preference(prompt, pair.chosen, pair.rejected, pair.margin)


_Convert = Callable[[Sequence[Row], Format, int, Dropped, Where], list[T]]


def _load(
    sources: Sequence[SourceSpec], use: Use, convert: _Convert[T], seed: int, epoch: int = 0
) -> tuple[list[T], LoadReport]:
    found: list[list[T]] = []
    reports: list[SourceReport] = []
    first = 0
    for source in sources:
        part, report, rows = _one(source, use, convert, seed, first)
        found.append(part)
        reports.append(report)
        first += rows
    order = weighted_rows([len(part) for part in found], [source.weight for source in sources], seed, epoch)
    return [found[source][row] for source, row in order], LoadReport(tuple(reports))


def _one(
    source: SourceSpec, use: Use, convert: _Convert[T], seed: int, first: int
) -> tuple[list[T], SourceReport, int]:
    """Examples of one source, the account of them, and how many rows there were."""
    dropped = Dropped()
    with _no_collection():
        placed = _read(source, seed, dropped)
        unreadable = dropped.total
        rows, places = [row for _, row in placed], [place for place, _ in placed]
        if not rows:
            raise UserError(_nothing_usable(source, dropped))
        chosen = find(rows, source.format, source.path)
        require(chosen, use, source.path)
        examples = convert(rows, chosen, first, dropped, _finder(places, first))
    if not examples:
        raise UserError(_nothing_usable(source, dropped))
    read = len(rows) + unreadable
    report = SourceReport(source=source, format=chosen.name, read=read, used=len(examples), dropped=dropped)
    return examples, report, len(rows)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Loading makes millions of objects and no cycles; looking for cycles among them doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _finder(places: Sequence[str], first: int) -> Where:
    return lambda row_id: places[row_id - first]


def _read(source: SourceSpec, seed: int, dropped: Dropped) -> list[tuple[str, Row]]:
    return read_placed_rows(
        source.path,
        source.split,
        source.columns,
        source.max_rows,
        subset=source.subset,
        seed=seed,
        dropped=dropped,
    )


def _nothing_usable(source: SourceSpec, dropped: Dropped) -> str:
    reasons = "; ".join(dropped.lines()) or "it has no rows"
    return f"{source.path} has no usable row: {reasons}; correct the file, or data.*.columns and data.*.format"
