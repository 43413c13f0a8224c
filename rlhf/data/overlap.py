"""Held-out rows that are training rows too: a number measured on them is no held-out number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.examples import Demonstration, Preference
from rlhf.rollout import Prompt

Example = Prompt | Demonstration | Preference


@dataclass(frozen=True)
class Overlap:
    """``count`` of ``held_out`` examples have a prompt that is in the training data; ``example`` is the first one's."""

    count: int
    held_out: int
    example: str

    def line(self) -> str:
        return (
            f"{self.count} of {self.held_out} rows have a prompt that is in data.train too, so what is measured on "
            f"them is not held out (first: {self.example!r:.80})"
        )


def overlap(train: Sequence[Example], held_out: Sequence[Example]) -> Overlap | None:
    """The held-out examples whose prompt is a training prompt, None when there are none. A plain text without a prompt
    counts as the same when the text is. Spaces at the ends do not make a difference."""
    known = {key for example in train for key in _keys(example)}
    shared = [keys[0] for example in held_out if known.intersection(keys := _keys(example))]
    return Overlap(len(shared), len(held_out), shared[0]) if shared else None


def _keys(example: Example) -> list[str]:
    prompt = example if isinstance(example, Prompt) else example.prompt
    if prompt.conversational or prompt.text:
        return ["\n\n".join(turn.content.strip() for turn in prompt.turns) or prompt.text.strip()]
    if isinstance(example, Preference):
        return [example.chosen.strip(), example.rejected.strip()]
    return [example.completion.strip()] if isinstance(example, Demonstration) else []
