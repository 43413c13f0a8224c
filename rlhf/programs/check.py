"""``rlhf check`` beyond the recipe: which rows are used and dropped, how they are tokenised, how long they are.

Reads data and tokenizer exactly as a run does, and loads no model. What cannot be looked at from here (the hub is out
of reach) is a warning; what would stop the run is an error, told after everything that can be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from rlhf import assemble
from rlhf.assemble import data as assembled
from rlhf.assemble import models
from rlhf.data import load
from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.load import quiet_libraries
from rlhf.programs import check_show as show
from rlhf.programs.hub import PATIENCE_SECONDS, offline_reason
from rlhf.programs.streams import by_prompt
from rlhf.recipe import Recipe
from rlhf.recipe.paths import place
from rlhf.recipe.reading import reads, reward_sources
from rlhf.recipe.schema import DataSource

ROWS = 10_000  # looked at per source: a table of lengths needs no more, and rendering them takes seconds


# What the rows of data.train and of data.eval are used as, by the loop that runs the objective.
_KINDS = {
    "policy": ("prompts", "prompts"),
    "preference": ("preferences", "prompts"),
    "sft": ("demonstrations", "demonstrations"),
    "reward": ("preferences", "preferences"),
}


@dataclass(frozen=True)
class Tokens:
    """One example as a run sees it. prompt: ids that are conditioned on; completions: ids that count, none where the
    policy writes them, two for a pair; counted: which of their ids are trained on, all where it is empty."""

    prompt: list[int]
    completions: tuple[list[int], ...]
    counted: tuple[list[bool], ...] = ()

    @property
    def marks(self) -> list[list[bool]]:
        return [*self.counted] or [[True] * len(ids) for ids in self.completions]


@dataclass
class Found:
    """The examples of one key of the recipe. text: the first one as it stands, where it could not be tokenised. notes:
    what else a run would say of them."""

    tokens: list[Tokens] = field(default_factory=list)
    text: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What a look brought to light. out: where a line goes, under a label."""

    out: Callable[[str, str | Text], None]
    errors: list[str] = field(default_factory=list)

    def problem(self, key: str, path: str, error: UserError) -> None:
        """Out of reach = a warning; everything else would stop the run."""
        if place(path) == "hub" and error.__cause__ is not None:
            self.out("warning", f"{key}: {error}")
        else:
            self.errors.append(f"{key}: {error}")


def describe_data(recipe: Recipe, rows: int = ROWS) -> None:
    """Prints what the first ``rows`` rows of every source come to. Raises UserError, one line for each thing that would
    stop the run."""
    findings = Findings(show.printer())
    offline = offline_reason(_paths(recipe))
    if offline is not None:
        findings.out("warning", f"{offline}; what is not in the cache cannot be shown")
    quiet_libraries()
    tokenizer = _tokenizer(recipe, findings)
    for key, kind, entries in _parts(recipe):
        _describe(recipe, key, kind, entries, rows, tokenizer, findings)
    if tokenizer is not None:
        for line in show.special_tokens(tokenizer, recipe.policy.path):
            findings.out("special", line)
    for line in served(recipe, tokenizer):
        findings.out("server", line)
    if findings.errors:
        raise UserError("\n".join(findings.errors))


def served(recipe: Recipe, tokenizer: Any) -> Iterator[str]:
    """What each named reward server holds now, asked once. One that does not answer stops nothing: it may be started
    later, or be out of this machine's reach only. tokenizer: the policy's, where it is at hand."""
    for here, entry in reward_sources(recipe):
        if entry.url is None:
            continue
        from rlhf.assemble.rewards import replicas_of
        from rlhf.rewards.server import describe

        hasty = entry.model_copy(update={"give_up_seconds": 2 * PATIENCE_SECONDS})
        yield from describe(replicas_of(".".join(map(str, here)), hasty), tokenizer if entry.send == "ids" else None)


def _paths(recipe: Recipe) -> list[str]:
    given = [recipe.policy.path, recipe.policy.tokenizer]
    sources = [source.path for _, _, entries in _parts(recipe) for source in entries]
    return [*(path for path in given if path is not None), *sources]


def _parts(recipe: Recipe) -> Iterator[tuple[str, str, Sequence[DataSource]]]:
    """(key, what its rows are used as, sources) of the data that the objective reads."""
    kind, held_out = _KINDS[assemble.program_of(recipe)]
    yield "data.train", kind, recipe.data.train
    if reads(recipe, "instruction") and recipe.instruction.coefficient > 0:
        yield "data.instruction", "demonstrations", recipe.data.instruction
    yield "data.eval", held_out, recipe.data.eval


def _first_rows(entry: DataSource, rows: int) -> DataSource:
    return entry.model_copy(update={"max_rows": min(entry.max_rows or rows, rows)})


def _tokenizer(recipe: Recipe, findings: Findings) -> Any:
    source = recipe.policy.path or recipe.policy.tokenizer
    try:
        return models.tokenizer_of(recipe)
    except UserError as error:
        if source is None:  # it is trained on data.train, and what is wrong there is told with the rows
            findings.out("warning", "no tokenizer, because it is trained on data.train: tokens and lengths not shown")
            return None
        findings.problem("tokens and lengths not shown", source, error)
        return None


def _describe(
    recipe: Recipe, key: str, kind: str, entries: Sequence[DataSource], rows: int, tokenizer: Any, findings: Findings
) -> None:
    """One key of the recipe: counts by source, the first example, and lengths over all of its sources."""
    found = Found()
    for index, entry in enumerate(entries):
        looked_at, limit = _first_rows(entry, rows), entry.max_rows
        report = _account(recipe, f"{key}.{index}", kind, looked_at, tokenizer, found, findings)
        if report is not None:
            cut = report.read == rows and (limit is None or limit > rows)
            for line in show.counts(f"{key}.{index}", report, cut=cut):
                findings.out("rows", line)
    for note in found.notes:
        findings.out("rows", f"{key}: {note}")
    if not found.tokens:
        if found.text is not None and key == "data.train":
            findings.out("example", found.text)
        return
    if key == "data.train":
        first = found.tokens[0]
        findings.out("example", show.example(tokenizer, kind, first.prompt, first.completions, first.marks))
        findings.out("bos", show.bos(tokenizer, [*first.prompt, *(first.completions or ([],))[0]]))
    completions = [ids for row in found.tokens for ids in row.completions]
    for line in show.lengths(key, kind, [row.prompt for row in found.tokens], completions):
        findings.out("lengths", line)
    if kind == "prompts" and key == "data.train":
        findings.out("lengths", f"completions are sampled: up to {recipe.rollout.max_new_tokens} tokens")


def _account(
    recipe: Recipe,
    name: str,
    kind: str,
    entry: DataSource,
    tokenizer: Any,
    found: Found,
    findings: Findings,
) -> load.SourceReport | None:
    """The account of one source; None where it cannot be read at all. What is wrong with it is noted."""
    try:
        return _counted(recipe, kind, entry, tokenizer, found)
    except UserError as error:
        findings.problem(name, entry.path, error)
    if tokenizer is not None:
        with suppress(UserError):  # without rendering: the rows may be fine and the template be what is missing
            return _counted(recipe, kind, entry, None, found)
    return None


def _counted(recipe: Recipe, kind: str, entry: DataSource, tokenizer: Any, found: Found) -> load.SourceReport:
    """The account of one source; its examples, tokenised, are added to ``found``."""
    if tokenizer is None:
        return _without_tokenizer(recipe, kind, entry, found)
    if kind == "prompts":
        prompts, report = assembled.prompts(recipe, [entry], tokenizer)
        found.tokens += [Tokens(render_prompt(tokenizer, prompt), ()) for prompt in prompts]
    elif kind == "demonstrations":
        examples, report = assembled.demonstrations(recipe, [entry], tokenizer)
        rows = assembled.tokenised(recipe, examples, tokenizer, found.notes.append)
        found.tokens += [Tokens(row.prompt, (row.completion,), (row.counted,)) for row in rows]
    else:
        pairs, report = assembled.preferences(recipe, [entry], tokenizer)
        if (different := len(by_prompt(pairs))) < len(pairs):
            size = recipe.batch.prompts_per_step
            found.notes.append(f"{len(pairs)} pairs of {different} prompts; a step takes {size} prompts, all pairs")
        for pair in pairs:
            sides = (render_completion(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected))
            found.tokens.append(Tokens(render_prompt(tokenizer, pair.prompt), tuple(sides)))
    return report.sources[0]


def _without_tokenizer(recipe: Recipe, kind: str, entry: DataSource, found: Found) -> load.SourceReport:
    """Which rows have the right shape. Plain text that prompts are cut from is counted whole."""
    loaders: dict[str, Callable[..., tuple[list[Any], load.LoadReport]]] = {
        "prompts": load.load_prompts,
        "demonstrations": load.load_demonstrations,
        "preferences": load.load_preferences,
    }
    given: dict[str, Any] = {"system_role": recipe.data.system_role, "seed": recipe.run.seed}
    try:
        rows, report = loaders[kind](assembled.sources([entry]), **given)
    except UserError:
        if recipe.data.prompt_tokens is None or kind != "prompts":
            raise
        rows, report = load.load_demonstrations(assembled.sources([entry]), **given)
    found.text = found.text or show.as_text(rows[0])
    return report.sources[0]
