"""Data as pure functions of the step: nothing to save, nothing to skip on resume, every rank its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.order import positions
from rlhf.interfaces import TokenStats
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.reference import Reference
from rlhf.objectives.supervised import Demonstrations, PairBatch
from rlhf.programs.measure import global_means
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
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
    """Gold instruction completions mixed into every policy update, and what is forgotten of them."""

    batches: ShuffledDemonstrations
    objective: Demonstrations
    coefficient: float
    reference: Reference
    microbatch_tokens: int
    runtime: Runtime

    def at(self, step: int) -> Term:
        batch = self.batches.at(step).to(self.runtime.device)
        return Term(objective=self.objective, batch=batch, coefficient=self.coefficient)

    def metrics(self, batch: TokenBatch, stats: TokenStats) -> dict[str, float]:
        """``kl/instruction`` = E_data[log π_ref(y|x) − log π(y|x)], nats a row at temperature 1; one reference forward.

        Up to a constant the forward KL(data‖π): 0 while the policy is the reference, rising as it forgets the data.
        """

        def forward(part: TokenBatch) -> TokenStats:
            return self.reference.stats(plain_rows(part), self.objective.request)

        known = microbatches.score(batch, forward, self.microbatch_tokens, self.runtime).logprobs
        counted = batch.completion_mask & batch.valid[:, None]
        lost = torch.where(counted, known - stats.logprobs, 0.0).sum()
        return global_means({"kl/instruction": (lost, batch.valid.sum())}, self.runtime)


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
