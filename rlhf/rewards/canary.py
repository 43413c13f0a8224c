"""A few short texts that tell a reward model from something that only returns numbers, before anything else loads.

A broken reward model does not fail: it scores. A policy then maximises whatever it says for hours. What can be seen in
a second is looked for here; each refusal is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.rollout import Prompt, Turn

QUESTION = "What is the capital of France?"
ANSWERS = (
    "Paris.",
    "The capital of France is Paris, a city on the river Seine.",
    "I do not know, and I would rather talk about something else for a while: the weather, or what there is to eat.",
    "no no no no no no no no",
    "Zzz",
)
SAME = 1e-6  # scores closer than this, relative to their size, say nothing
Score = Callable[[Sequence[Sequence[int]]], Tensor]


def tokenizer_fits(tokenizer: Any, vocabulary: int | None, where: str) -> None:
    """Raises UserError where the tokenizer's vocabulary is larger than the model's. Tokens added to it later are left
    out: Gemma 3 1B's tokenizer has one more than the model embeds, an image token that no text becomes."""
    if vocabulary is not None and tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"{where}: the tokenizer beside it has {tokenizer.vocab_size} tokens and the model embeds {vocabulary}, so "
            "it is another model's tokenizer; save the one that it was trained with in its folder"
        )


def scores_mean_something(
    score: Score, model: nn.Module, tokenizer: Any, *, where: str, max_tokens: int | None, tolerance: float
) -> None:
    """Scores a handful of texts alone and together. ``score``: token rows → [n] scores of one padded forward.

    Raises UserError for ids without an embedding, for scores that are not finite or all the same (a head that was never
    trained), and for a score that changes by more than ``tolerance``, relative to scores above 1, with the rows beside
    it. Texts longer than the model's context are left out.
    """
    rows = [row for row in canary_rows(tokenizer) if max_tokens is None or len(row) <= max_tokens]
    if len(rows) < 2:
        return
    _ids_are_embedded(rows, model, where)
    together = score(rows).double().cpu()
    alone = torch.cat([score([row]) for row in rows]).double().cpu()
    size = max(1.0, float(alone.abs().max()))
    if not bool(torch.cat([together, alone]).isfinite().all()):
        raise UserError(f"{where}: scores {_shown(alone)} on plain texts: its weights are damaged, or their type is")
    gap = float((together - alone).abs().max())
    if gap > tolerance * size:
        raise UserError(
            f"{where}: the score of a text changes by {gap:.2g} with the texts that are padded beside it, so rewards "
            "would depend on the batch; it needs a model that reads its attention mask and has no batch statistics"
        )
    if float(alone.max() - alone.min()) <= SAME * size:
        raise UserError(
            f"{where}: gives {len(rows)} different texts the same score ({float(alone[0]):g}), so its head was never "
            "trained; train it with objective=reward"
        )


def canary_rows(tokenizer: Any) -> list[list[int]]:
    """The texts as the tokenizer renders them: a conversation where it has a template, plain text otherwise."""
    prompt = Prompt(row_id=0, text=f"{QUESTION}\n")
    if getattr(tokenizer, "chat_template", None):
        prompt = Prompt(row_id=0, turns=(Turn(role="user", content=QUESTION),))
    ids = render_prompt(tokenizer, prompt)
    return [ids + render_completion(tokenizer, prompt, answer) for answer in ANSWERS]


def _ids_are_embedded(rows: Sequence[Sequence[int]], model: nn.Module, where: str) -> None:
    table = cast(Any, model).get_input_embeddings()
    largest = max(max(row) for row in rows)
    if largest >= table.num_embeddings:
        raise UserError(
            f"{where}: its tokenizer gives id {largest} and the model embeds {table.num_embeddings}, so it is another "
            "model's tokenizer; save the one that it was trained with in its folder"
        )


def _shown(scores: Tensor) -> str:
    return "[" + ", ".join(f"{score:g}" for score in scores.tolist()) + "]"
