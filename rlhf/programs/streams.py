"""Data as pure functions of the step: nothing to save, nothing to skip on resume, every rank its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.order import epoch_permutation, positions, subset
from rlhf.interfaces import TokenStats
from rlhf.models.chat import Dialogue, render_completion, render_dialogue, render_prompt
from rlhf.models.layout import Layout, plain_rows
from rlhf.models.reference import Reference
from rlhf.objectives.supervised import DemonstrationBatch, Demonstrations, PairBatch
from rlhf.programs.measure import global_means
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import Term


@dataclass(frozen=True, kw_only=True)
class ShuffledPrompts:
    """A step's prompts: the next ``per_step`` of an endless sequence of shuffled epochs, dealt to the ranks."""

    prompts: Sequence[Prompt]
    per_step: int
    seed: int
    rank: int = 0
    ranks: int = 1

    def at(self, step: int) -> tuple[list[Prompt], list[int]]:
        rows = positions(step, self.per_step, len(self.prompts), self.seed)
        slots = dealt([_length(self.prompts[row]) for row in rows], self.ranks)[self.rank]
        return [self.prompts[rows[slot]] for slot in slots], slots


def dealt(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Positions for each rank, as many for each, so that their lengths add up to about the same: the longest first,
    back and forth over the ranks. A rank's own are in their order."""
    longest = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    there = list(range(ranks))
    shares: list[list[int]] = [[] for _ in there]
    for turn, first in enumerate(range(0, len(longest), ranks)):
        for rank, at in zip(reversed(there) if turn % 2 else there, longest[first : first + ranks], strict=False):
            shares[rank].append(at)
    return [sorted(share) for share in shares]


def _length(prompt: Prompt) -> int:
    """In characters: tokens are not known yet, and it is only to be fair."""
    return len(prompt.text) + sum(len(turn.content) for turn in prompt.turns)


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
    layout: Layout = plain_rows

    def at(self, step: int) -> Term:
        batch = self.batches.at(step).to(self.runtime.device)
        return Term(objective=self.objective, batch=batch, coefficient=self.coefficient)

    def metrics(self, batch: TokenBatch, stats: TokenStats) -> dict[str, float]:
        """``kl/instruction`` = E_data[log π_ref(y|x) − log π(y|x)], nats a row at temperature 1; one reference forward.

        Up to a constant the forward KL(data‖π): 0 while the policy is the reference, rising as it forgets the data.
        """

        def forward(part: TokenBatch) -> TokenStats:
            return self.reference.stats(self.layout(part), self.objective.request)

        cells = self.layout.cells
        with self.reference.use():
            known = microbatches.score(batch, forward, self.microbatch_tokens, self.runtime, cells).logprobs
        assert isinstance(batch, DemonstrationBatch)
        counted = batch.counted & batch.valid[:, None]
        lost = torch.where(counted, known - stats.logprobs, 0.0).sum()
        return global_means({"kl/instruction": (lost, batch.valid.sum())}, self.runtime)


PromptPairs = Sequence[Preference]  # the pairs of one prompt


def by_prompt(pairs: Sequence[Preference]) -> list[PromptPairs]:
    """Pairs that share a prompt together, in the order in which prompts first appear.

    Equal conversations render to equal text. Pairs of labelled text have no prompt to share: each stands alone.
    """
    prompts: dict[object, list[Preference]] = {}
    for index, pair in enumerate(pairs):
        prompt = pair.prompt
        shared = prompt.turns or prompt.text
        prompts.setdefault((prompt.turns, prompt.text) if shared else index, []).append(pair)
    return list(prompts.values())


def pair_batch(prompts: Sequence[PromptPairs], tokenizer: Any) -> PairBatch:
    """One row for each completion of each prompt, as the reward model reads it, in order of first appearance."""
    rows = []
    for group, pairs in enumerate(prompts):
        texts = list(dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected)))
        ids = render_prompt(tokenizer, pairs[0].prompt)
        for member, text in enumerate(texts):
            beats = tuple((texts.index(pair.rejected), pair.margin or 0.0) for pair in pairs if pair.chosen == text)
            rows.append((ids, render_completion(tokenizer, pairs[0].prompt, text), group, member, beats))
    return PairBatch.from_ids(
        [row[0] for row in rows],
        [row[1] for row in rows],
        group=[row[2] for row in rows],
        member=torch.tensor([row[3] for row in rows]),
        beats=tuple(row[4] for row in rows),
    )


@dataclass(frozen=True, kw_only=True)
class ShuffledPairs:
    """A step's prompts, each with all its pairs: ``per_step`` of an endless sequence of shuffled epochs.

    epoch_prompts(epoch): the prompts of an epoch (labelled text is paired anew each time, and a source of fractional
    weight has other rows). per_epoch: how many they are in epoch 0, and the slots of every epoch; where an epoch has
    fewer, the first come twice, and where it has more, the last are left out. pairs_per_prompt: at most so many pairs
    of a prompt, drawn anew each epoch; None = all.
    """

    epoch_prompts: Callable[[int], Sequence[PromptPairs]]
    per_epoch: int
    per_step: int
    seed: int
    own: slice
    tokenizer: Any
    pairs_per_prompt: int | None = None

    def at(self, step: int) -> PairBatch:
        first = (step - 1) * self.per_step
        slots = range(first, first + self.per_step)[self.own]
        return pair_batch([self._pairs(*divmod(slot, self.per_epoch)) for slot in slots], self.tokenizer)

    def _pairs(self, epoch: int, slot: int) -> PromptPairs:
        prompts = self.epoch_prompts(epoch)
        index = int(epoch_permutation(len(prompts), self.seed, epoch)[slot % len(prompts)])
        pairs, limit = prompts[index], self.pairs_per_prompt
        if limit is None or len(pairs) <= limit:
            return pairs
        return [pairs[i] for i in subset(len(pairs), limit, self.seed, epoch, index)]
