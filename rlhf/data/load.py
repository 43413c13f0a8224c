"""Sources of data → prompts, demonstrations or preferences, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf.data import formats
from rlhf.data.dropped import Dropped, Where
from rlhf.data.examples import Demonstration, Preference
from rlhf.data.limits import LongPrompts, within_length, without_unsupported_system
from rlhf.data.order import weighted_rows
from rlhf.data.read import Row, read_placed_rows
from rlhf.errors import UserError
from rlhf.models.chat import SystemRole
from rlhf.rollout import Prompt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where rows come from. ``weight`` multiplies how often they come in an epoch; ``columns``: our name → theirs."""

    path: str
    split: str = "train"
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

    def convert(rows: Sequence[Row], source: SourceSpec, first: int, dropped: Dropped, where: Where) -> list[Prompt]:
        found = formats.to_prompts(
            rows,
            format=source.format,
            dropped=dropped,
            tokenizer=tokenizer,
            prompt_tokens=prompt_tokens,
            first_row_id=first,
            where=where,
        )
        found = without_unsupported_system(found, tokenizer, system_role)
        if tokenizer is None:
            return found
        return within_length(found, tokenizer, max_prompt_tokens, long_prompts, dropped, where)

    return _load(sources, convert, seed)


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

    def convert(
        rows: Sequence[Row], source: SourceSpec, first: int, dropped: Dropped, where: Where
    ) -> list[Demonstration]:
        found = formats.to_demonstrations(rows, format=source.format, dropped=dropped, first_row_id=first, where=where)
        prompts = without_unsupported_system([example.prompt for example in found], tokenizer, system_role)
        if tokenizer is not None:
            prompts = within_length(prompts, tokenizer, max_prompt_tokens, long_prompts, dropped, where)
        replies = {example.prompt.row_id: example.completion for example in found}
        return [Demonstration(prompt, replies[prompt.row_id]) for prompt in prompts]

    return _load(sources, convert, seed)


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

    def convert(
        rows: Sequence[Row], source: SourceSpec, first: int, dropped: Dropped, where: Where
    ) -> list[Preference]:
        found = formats.to_preferences(
            rows, seed=seed, epoch=epoch, format=source.format, dropped=dropped, first_row_id=first, where=where
        )
        prompts = without_unsupported_system([pair.prompt for pair in found], tokenizer, system_role)
        if tokenizer is not None:
            prompts = within_length(prompts, tokenizer, max_prompt_tokens, long_prompts, dropped, where)
        pairs = {pair.prompt.row_id: pair for pair in found}
        return [_with_prompt(pairs[prompt.row_id], prompt) for prompt in prompts]

    return _load(sources, convert, seed, epoch)


def load_labelled(sources: Sequence[SourceSpec], *, seed: int = 0) -> list[Demonstration]:
    """Every text of the sources that hold labelled text, with ``prompt.columns["label"]``; none of the others'."""
    found: list[Demonstration] = []
    for source in sources:
        rows = [row for _, row in _read(source, seed, Dropped())]
        if formats.detect(rows, source.format) == "text":
            found += formats.to_labelled(rows, dropped=Dropped())
    return found


def training_texts(sources: Sequence[SourceSpec], seed: int = 0) -> Iterator[str]:
    """Every text in the sources, for training a tokenizer on them."""
    for source in sources:
        for _, row in _read(source, seed, Dropped()):
            yield from formats.texts(row)


def _with_prompt(pair: Preference, prompt: Prompt) -> Preference:
    return Preference(prompt, pair.chosen, pair.rejected, pair.margin)


_Convert = Callable[[Sequence[Row], SourceSpec, int, Dropped, Where], list[T]]


def _load(sources: Sequence[SourceSpec], convert: _Convert[T], seed: int, epoch: int = 0) -> tuple[list[T], LoadReport]:
    found: list[list[T]] = []
    reports: list[SourceReport] = []
    first = 0
    for source in sources:
        dropped = Dropped()
        placed = _read(source, seed, dropped)
        unreadable = dropped.total
        rows, places = [row for _, row in placed], [place for place, _ in placed]
        examples = convert(rows, source, first, dropped, _finder(places, first)) if rows else []
        if not examples:
            raise UserError(_nothing_usable(source, dropped))
        kind, read = formats.detect(rows, source.format), len(rows) + unreadable
        reports.append(SourceReport(source=source, format=kind, read=read, used=len(examples), dropped=dropped))
        found.append(examples)
        first += len(rows)
    order = weighted_rows([len(part) for part in found], [source.weight for source in sources], seed, epoch)
    return [found[source][row] for source, row in order], LoadReport(tuple(reports))


def _finder(places: Sequence[str], first: int) -> Where:
    return lambda row_id: places[row_id - first]


def _read(source: SourceSpec, seed: int, dropped: Dropped) -> list[tuple[str, Row]]:
    return read_placed_rows(source.path, source.split, source.columns, source.max_rows, seed=seed, dropped=dropped)


def _nothing_usable(source: SourceSpec, dropped: Dropped) -> str:
    reasons = "; ".join(dropped.lines()) or "it has no rows"
    return f"{source.path} has no usable row: {reasons}; correct the file, or data.*.columns and data.*.format"
