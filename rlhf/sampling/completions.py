"""What every engine hands back, and how the completions of a step become one Rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.models.chat import completion_text
from rlhf.rollout import Prompt, Rollout, pad_rows


class Completion(NamedTuple):
    """One sampled row: its ids with the stop token, log π_T of each ([len(ids)] nats, on the CPU), whether it ended."""

    ids: list[int]
    logprobs: Tensor
    finished: bool


@dataclass(frozen=True)
class Ends:
    """Where completions end: at any of these ids, which belong to them, or with the token that completes a string."""

    tokenizer: Any
    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()

    def text(self, row: Completion) -> str:
        """What the completion says: without the stop token, and without the stop string and what follows it."""
        stopped_by_id = row.finished and row.ids[-1] in self.ids
        text = completion_text(self.tokenizer, row.ids[:-1] if stopped_by_id else row.ids)
        if not row.finished or stopped_by_id:
            return text
        return text[: min((at for at in map(text.find, self.strings) if at >= 0), default=len(text))]


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
        texts=tuple(ends.text(row) for row in found),
        sample=torch.arange(count).repeat(len(prompts)),
        finished=torch.tensor([row.finished for row in found], dtype=torch.bool),
        rollout_logprobs=logprobs,
    )
