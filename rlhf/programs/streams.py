"""Data as pure functions of the step: nothing to save, nothing to skip on resume, every rank its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.order import positions
from rlhf.models.chat import render_completion, render_prompt
from rlhf.objectives.supervised import Demonstrations, PairBatch
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime.updater import Term


@dataclass(frozen=True, kw_only=True)
class ShuffledPrompts:
    """A step's prompts: the next ``per_step`` of an endless sequence of shuffled epochs."""

    prompts: Sequence[Prompt]
    per_step: int
    seed: int
    own: slice

    def at(self, step: int) -> tuple[list[Prompt], list[int]]:
        rows = positions(step, self.per_step, len(self.prompts), self.seed)
        slots = range(self.per_step)[self.own]
        return [self.prompts[rows[slot]] for slot in slots], list(slots)


def demonstration_ids(example: Demonstration, tokenizer: Any, *, completion_only: bool) -> tuple[list[int], list[int]]:
    """(conditioning ids, ids that are trained on). With ``completion_only`` false only the first id is given."""
    prompt = render_prompt(tokenizer, example.prompt)
    completion = render_completion(tokenizer, example.prompt, example.completion)
    if not completion_only:
        prompt, completion = prompt[:1], prompt[1:] + completion
    return prompt, completion


@dataclass(frozen=True, kw_only=True)
class ShuffledDemonstrations:
    """A step's tokenised demonstrations."""

    rows: Sequence[tuple[list[int], list[int]]]
    per_step: int
    seed: int
    own: slice

    def at(self, step: int) -> TokenBatch:
        chosen = positions(step, self.per_step, len(self.rows), self.seed)[self.own]
        return TokenBatch.from_ids([self.rows[i][0] for i in chosen], [self.rows[i][1] for i in chosen])


@dataclass(frozen=True, kw_only=True)
class InstructionTerms:
    """Gold instruction completions mixed into every policy update."""

    batches: ShuffledDemonstrations
    objective: Demonstrations
    coefficient: float
    device: torch.device

    def at(self, step: int) -> Term:
        batch = self.batches.at(step).to(self.device)
        return Term(objective=self.objective, batch=batch, coefficient=self.coefficient)


def pair_batch(pairs: Sequence[Preference], tokenizer: Any) -> PairBatch:
    """Rows 2i and 2i + 1: the chosen and the rejected completion of pair i, as the reward model reads them."""
    sides = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    return PairBatch.from_ids(
        [render_prompt(tokenizer, pair.prompt) for pair, _ in sides],
        [render_completion(tokenizer, pair.prompt, text) for pair, text in sides],
        group=[i // 2 for i in range(len(sides))],
        chosen=torch.arange(len(sides)) % 2 == 0,
        margin=torch.tensor([pair.margin or 0.0 for pair, _ in sides], dtype=torch.float32),
    )


@dataclass(frozen=True, kw_only=True)
class ShuffledPairs:
    """A step's pairs. ``epoch_pairs(epoch)``: the pairs of an epoch (labelled text is paired anew each time)."""

    epoch_pairs: Callable[[int], Sequence[Preference]]
    per_epoch: int
    per_step: int
    seed: int
    own: slice
    tokenizer: Any

    def at(self, step: int) -> PairBatch:
        first = (step - 1) * self.per_step
        rows = positions(step, self.per_step, self.per_epoch, self.seed)
        where = [((first + offset) // self.per_epoch, row) for offset, row in enumerate(rows)]
        return pair_batch([self.epoch_pairs(epoch)[row] for epoch, row in where[self.own]], self.tokenizer)
