"""What every engine hands back, and how the completions of a step become one Rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.interfaces import Ended
from rlhf.models.chat import completion_text
from rlhf.rollout import Group, Prompt, Rollout, pad_rows


class Completion(NamedTuple):
    """One sampled row: its ids with the stop token, log π_T of each ([len(ids)] nats, on the CPU), whether it ended."""

    ids: list[int]
    logprobs: Tensor
    finished: bool


Each = Callable[[int, list[int], bool], None]  # told of a row that has ended: its place, ids, whether it stopped


def nobody(row: int, ids: list[int], finished: bool) -> None:
    """An ``Each`` where nobody wants to know."""


@dataclass(frozen=True)
class Ends:
    """Where completions end: at any of these ids, which belong to them, or with the token that completes a string."""

    tokenizer: Any
    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()

    def text(self, ids: list[int], finished: bool) -> str:
        """What the completion says: without the stop token, and without the stop string and what follows it."""
        stopped_by_id = finished and ids[-1] in self.ids
        text = completion_text(self.tokenizer, ids[:-1] if stopped_by_id else ids)
        if not finished or stopped_by_id:
            return text
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Tells of a prompt's completions as soon as the last of them has ended, of each prompt once.

    prompt_ids: of each prompt. count: completions of each. step: of the rollout that they belong to.
    """

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    slots: Sequence[int]
    count: int
    ends: Ends
    tell: Ended
    step: int
    found: dict[int, tuple[list[int], bool]] = field(default_factory=dict)

    def add(self, row: int, ids: list[int], finished: bool) -> None:
        """One completion (an ``Each``). row: its place, prompt by prompt. One that is known already is passed over."""
        if row in self.found:
            return
        self.found[row] = ids, finished
        place = row // self.count
        rows = range(place * self.count, (place + 1) * self.count)
        if all(at in self.found for at in rows):
            own = [self.found[at] for at in rows]
            group = Group(
                slot=self.slots[place],
                prompt=self.prompts[place],
                prompt_ids=tuple(self.prompt_ids[place]),
                ids=tuple(tuple(drawn) for drawn, _ in own),
                texts=tuple(self.ends.text(*completion) for completion in own),
                finished=tuple(end for _, end in own),
            )
            self.tell(group, self.step)

    def rest(self, completions: Iterable[Completion]) -> None:
        """All of them, in order."""
        for row, completion in enumerate(completions):
            self.add(row, completion.ids, completion.finished)


def rollout(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]],
    slots: Sequence[int],
    found: Sequence[Completion],
    ends: Ends,
) -> Rollout:
    """The completions of every prompt as one Rollout on the CPU, prompt by prompt, samples 0 … k-1 within each.

    prompt_ids, slots: of each prompt. found: as many completions of each, in its order.
    """
    count = len(found) // len(prompts) if prompts else 0
    ids_p, mask_p = pad_rows([ids for ids in prompt_ids for _ in range(count)], side="left")
    ids_c, mask_c = pad_rows([row.ids for row in found], side="right")
    logprobs = torch.zeros(ids_c.shape, dtype=torch.float32)
    if found:
        logprobs[mask_c] = torch.cat([row.logprobs for row in found])
    return Rollout(
        prompt_ids=ids_p,
        prompt_mask=mask_p,
        completion_ids=ids_c,
        completion_mask=mask_c,
        group=torch.tensor(slots, dtype=torch.long).repeat_interleave(count),
        valid=torch.ones(len(found), dtype=torch.bool),
        prompts=tuple(prompt for prompt in prompts for _ in range(count)),
        texts=tuple(ends.text(row.ids, row.finished) for row in found),
        sample=torch.arange(count).repeat(len(prompts)),
        finished=torch.tensor([row.finished for row in found], dtype=torch.bool),
        rollout_logprobs=logprobs,
    )
