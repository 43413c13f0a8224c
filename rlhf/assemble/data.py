"""Recipe → rows of data, tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rlhf.data import load as data
from rlhf.data.examples import Preference
from rlhf.models.chat import Dialogue
from rlhf.programs.streams import demonstration_ids
from rlhf.recipe import Recipe
from rlhf.recipe.schema import DataSource
from rlhf.rollout import Prompt

_ONE_REPLY = (
    "{} conversations: only the last reply is imitated, because the chat template shows earlier turns otherwise once "
    "later ones follow"
)


def sources(entries: Sequence[DataSource]) -> list[data.SourceSpec]:
    return [
        data.SourceSpec(
            path=entry.path,
            split=entry.split,
            format=entry.format,
            weight=entry.weight,
            columns=dict(entry.columns),
            max_rows=entry.max_rows,
        )
        for entry in entries
    ]


def prompts(recipe: Recipe, entries: Sequence[DataSource], tokenizer: Any) -> tuple[list[Prompt], data.LoadReport]:
    return data.load_prompts(
        sources(entries), tokenizer=tokenizer, prompt_tokens=recipe.data.prompt_tokens, **_limits(recipe)
    )


def demonstrations(
    recipe: Recipe, entries: Sequence[DataSource], tokenizer: Any
) -> tuple[list[Dialogue], data.LoadReport]:
    """The token rows of every demonstration."""
    examples, report = data.load_demonstrations(sources(entries), tokenizer=tokenizer, **_limits(recipe))
    only, every = recipe.sft.completion_only, recipe.sft.turns == "all"
    rows = [demonstration_ids(row, tokenizer, completion_only=only, every_turn=every) for row in examples]
    short = sum(not whole for _, whole in rows)
    if short:
        report = replace(report, notes=(*report.notes, _ONE_REPLY.format(short)))
    return [row for row, _ in rows], report


def preferences(
    recipe: Recipe, entries: Sequence[DataSource], tokenizer: Any, epoch: int = 0
) -> tuple[list[Preference], data.LoadReport]:
    return data.load_preferences(sources(entries), tokenizer=tokenizer, epoch=epoch, **_limits(recipe))


def _limits(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.data
    return {
        "max_prompt_tokens": settings.max_prompt_tokens,
        "long_prompts": settings.long_prompts,
        "system_role": settings.system_role,
        "seed": recipe.run.seed,
    }


def tell(note: Callable[[str], None], key: str, report: data.LoadReport) -> None:
    """One line a source: what was used, and what was dropped for which reason."""
    for line in report.lines():
        note(f"{key}: {line}")
