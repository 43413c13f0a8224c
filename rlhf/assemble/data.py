"""Recipe → rows of data, tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf.data import load as data
from rlhf.data.examples import Demonstration, Preference
from rlhf.data.overlap import overlap
from rlhf.models.chat import Dialogue
from rlhf.programs.streams import demonstration_ids
from rlhf.recipe import Recipe
from rlhf.recipe.schema import DataSource
from rlhf.rollout import Prompt

Example = TypeVar("Example", Prompt, Demonstration, Preference)

_ONE_REPLY = (
    "{} conversations: only the last reply is imitated, because the chat template shows earlier turns otherwise once "
    "later ones follow"
)


def sources(entries: Sequence[DataSource]) -> list[data.SourceSpec]:
    return [
        data.SourceSpec(
            path=entry.path,
            split=entry.split,
            subset=entry.subset,
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
) -> tuple[list[Demonstration], data.LoadReport]:
    return data.load_demonstrations(sources(entries), tokenizer=tokenizer, **_limits(recipe))


def tokenised(
    recipe: Recipe, examples: Sequence[Demonstration], tokenizer: Any, note: Callable[[str], None]
) -> list[Dialogue]:
    """The token rows of every demonstration."""
    only, every = recipe.sft.completion_only, recipe.sft.turns == "all"
    rows = [demonstration_ids(row, tokenizer, completion_only=only, every_turn=every) for row in examples]
    short = sum(not whole for _, whole in rows)
    if short:
        note(_ONE_REPLY.format(short))
    return [row for row, _ in rows]


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


def train_and_eval(
    load: Callable[[Recipe, Sequence[DataSource], Any], tuple[list[Example], data.LoadReport]],
    recipe: Recipe,
    note: Callable[[str], None],
    tokenizer: Any,
) -> tuple[list[Example], list[Example]]:
    """Rows to train on and the first ``eval.samples`` held-out ones. What was dropped, and what is in both, is told."""
    rows, report = load(recipe, recipe.data.train, tokenizer)
    tell(note, "data.train", report)
    if not recipe.data.eval:
        return rows, []
    held_out, report = load(recipe, recipe.data.eval, tokenizer)
    tell(note, "data.eval", report)
    tell_overlap(note, rows, held_out)
    return rows, held_out[: recipe.eval.samples]


def tell_overlap(
    note: Callable[[str], None],
    rows: Sequence[Prompt | Demonstration | Preference],
    held_out: Sequence[Prompt | Demonstration | Preference],
) -> None:
    """One line where held-out rows have a prompt that is trained on."""
    shared = overlap(rows, held_out)
    if shared is not None:
        note(f"data.eval: {shared.line()}")


def tell(note: Callable[[str], None], key: str, report: data.LoadReport) -> None:
    """One line a source: what was used, and what was dropped for which reason."""
    for line in report.lines():
        note(f"{key}: {line}")
