"""Data as pure functions of the step: nothing to save, nothing to skip on resume, every rank its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.order import positions
from rlhf.interfaces import TokenStats
from rlhf.models.chat import Dialogue, render_completion, render_dialogue, render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.reference import Reference
from rlhf.objectives.supervised import DemonstrationBatch, Demonstrations, PairBatch
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


def demonstration_ids(
    example: Demonstration, tokenizer: Any, *, completion_only: bool, every_turn: bool
) -> tuple[Dialogue, bool]:
    """The row of a demonstration, and whether it holds every reply that was asked for.

    ``completion_only``: the replies are imitated, else everything after the first id. ``every_turn``: all assistant
    turns of a conversation, else the last one.
    """
    several = completion_only and every_turn and any(turn.role == "assistant" for turn in example.prompt.turns)
    dialogue = render_dialogue(tokenizer, example.prompt, example.completion) if several else None
    if dialogue is not None:
        return dialogue, True
    prompt = render_prompt(tokenizer, example.prompt)
    completion = render_completion(tokenizer, example.prompt, example.completion)
    if not completion_only:
        prompt, completion = prompt[:1], prompt[1:] + completion
    return Dialogue(prompt, completion, [True] * len(completion)), not several


@dataclass(frozen=True, kw_only=True)
class ShuffledDemonstrations:
    """A step's tokenised demonstrations."""

    rows: Sequence[Dialogue]
    per_step: int
    seed: int
    own: slice

    def at(self, step: int) -> DemonstrationBatch:
        chosen = positions(step, self.per_step, len(self.rows), self.seed)[self.own]
        return DemonstrationBatch.of([self.rows[i] for i in chosen])


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
        assert isinstance(batch, DemonstrationBatch)
        counted = batch.counted & batch.valid[:, None]
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
