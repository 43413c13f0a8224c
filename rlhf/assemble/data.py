"""Recipe → rows of data, tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data import load as data
from rlhf.data.examples import Demonstration
from rlhf.programs.streams import demonstration_ids
from rlhf.recipe import Recipe
from rlhf.recipe.schema import DataSource
from rlhf.rollout import Prompt


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
    settings = recipe.data
    return data.load_prompts(
        sources(entries),
        tokenizer=tokenizer,
        prompt_tokens=settings.prompt_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        long_prompts=settings.long_prompts,
        system_role=settings.system_role,
        seed=recipe.run.seed,
    )


def demonstrations(
    recipe: Recipe, entries: Sequence[DataSource], tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    """(conditioning ids, trained ids) of every demonstration."""
    rows: list[Demonstration]
    rows, _ = data.load_demonstrations(sources(entries), tokenizer=tokenizer, system_role=recipe.data.system_role)
    only = recipe.sft.completion_only
    return [demonstration_ids(row, tokenizer, completion_only=only, max_tokens=None) for row in rows]
