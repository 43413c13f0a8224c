"""The record that travels through a step: token rows, then everything known about them.

B = completions on this process, P = padded prompt width, C = padded completion width. Prompts are left-padded and
completions right-padded, so prompt and completion meet at one column. Masks have one polarity: True = counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a completion is conditioned on: a conversation that ends with a user turn, or plain text.

    ``turns`` is empty for plain text; ``text`` is empty for a conversation. ``columns`` holds the other columns of the
    data row, which reward functions receive by name. ``row_id`` is the row's position in its data set.
    """

    row_id: int
    turns: tuple[Turn, ...] = ()
    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return bool(self.turns)

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the list of ``{"role", "content"}`` that chat templates and reward functions take."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]


class Group(NamedTuple):
    """A prompt's completions, of a rollout that need not be whole yet. slot: the prompt's place in the step. ids: of
    each completion, its stop token included."""

    slot: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    finished: tuple[bool, ...]


def pad_rows(rows: Sequence[Sequence[int]], *, side: str, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Pads id lists to one width. Returns ids [B, W] int64 and mask [B, W] bool (True = a real token).

    Masks come from lengths, never from ``ids != pad_id``: a pad id may be a real token.
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        if not row:
            continue
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = torch.tensor(row, dtype=torch.long)
        mask[index, columns] = True
    return ids, mask


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Token rows that a model scores, and how they belong together.

    prompt_ids      [B, P] int64, left-padded
    prompt_mask     [B, P] bool
    completion_ids  [B, C] int64, right-padded, stop token included
    completion_mask [B, C] bool: tokens that count in losses, KL and metrics
    group           [B] int64: rows of one unit share it (completions of a prompt, the two sides of a pair)
    valid           [B] bool: False = the row takes part in no baseline, no loss and no count
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    group: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """The given rows, in the given order, with all-padding columns cut away."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.group.device)
        return self.map(lambda value: _take(value, index, len(self))).trimmed()

    def to(self, device: torch.device | str) -> Self:
        return self.map(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def map(self, function: Callable[[Any], Any]) -> Self:
        """A copy with ``function`` applied to every field that is set (to each value of a mapping field)."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                changes[item.name] = {key: function(entry) for key, entry in value.items()}
            elif value is not None:
                changes[item.name] = function(value)
        return replace(self, **changes)

    def trimmed(self) -> Self:
        """The same rows in the narrowest tensors that hold them."""
        width_p = int(self.prompt_mask.sum(1).max()) if len(self) else 0
        width_c = int(self.completion_mask.sum(1).max()) if len(self) else 0
        full_p, full_c = self.prompt_ids.shape[1], self.completion_ids.shape[1]

        def narrow(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2:
                return value
            return value[:, full_p - width_p :] if name.startswith("prompt_") else value[:, :width_c]

        if width_p == full_p and width_c == full_c:
            return self
        changes = {item.name: narrow(item.name, getattr(self, item.name)) for item in fields(self)}
        return replace(self, **changes)

    @property
    def lengths(self) -> Tensor:
        """[B] int64: real tokens of prompt and completion together."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)

    @classmethod
    def from_ids(
        cls,
        prompt_rows: Sequence[Sequence[int]],
        completion_rows: Sequence[Sequence[int]],
        /,
        *,
        group: Sequence[int] | None = None,
        **extra: Any,
    ) -> Self:
        """Builds a batch from id lists; every row is valid and, unless told otherwise, a unit of its own."""
        prompt_ids, prompt_mask = pad_rows(prompt_rows, side="left")
        completion_ids, completion_mask = pad_rows(completion_rows, side="right")
        return cls(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=completion_ids,
            completion_mask=completion_mask,
            group=torch.as_tensor(range(len(prompt_rows)) if group is None else group, dtype=torch.long),
            valid=torch.ones(len(prompt_rows), dtype=torch.bool),
            **extra,
        )


@dataclass(frozen=True, kw_only=True)
class Rollout(TokenBatch):
    """Completions sampled at one step and what is known about them; a field not yet known is None.

    prompts           B prompts (the k completions of a prompt repeat it)
    texts             B completions as text, stop token and special tokens removed
    slot              [B] int64: the prompt's position in the step's global prompt list (= ``group``)
    sample            [B] int64: 0 … k-1 within the group
    finished          [B] bool: ended with a stop token or stop string
    rollout_logprobs  [B, C] nats, recorded by the sampler (behaviour policy)
    old_logprobs      [B, C] nats, trainer's policy at the start of the update; of completions decoded ahead the
                      sampler's
    entropy           [B, C] nats, of the same policy; where a step is cut into minibatches
    ref_logprobs      [B, C] nats, the reference
    values            [B, C] value model
    scores            source name → [B] raw score, NaN where the source could not score the row
    rewards           [B] scores combined, clipped, missing-stop replacement applied; before KL; NaN where not valid
    greedy_rewards    [B] reward of the greedy completion of the row's prompt (ReMax)
    score_norms       [B, C] squared norm proxy of the token's score vector, 1 − 2π(y_t) + Σ_v π(v)²
    beta              KL coefficient of this step where it adapts
    returns           [B, C] what the value model is fitted to
    baseline          [B] or [B, C], what ``prepare`` subtracted
    advantage_scale   [B] what advantages were multiplied with, where they were divided by a standard deviation
    advantages        [B] or [B, C], detached; before the part of the KL penalty that is taken from live logprobs
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    sample: Tensor
    finished: Tensor
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
    greedy_rewards: Tensor | None = None
    score_norms: Tensor | None = None
    beta: float | None = None
    returns: Tensor | None = None
    baseline: Tensor | None = None
    advantages: Tensor | None = None
    advantage_scale: Tensor | None = None

    def groups(self) -> Iterator[Group]:
        """The completions prompt by prompt, in the order of the rows."""
        here = self.to("cpu")
        drawn = [tuple(ids[mask].tolist()) for ids, mask in zip(here.completion_ids, here.completion_mask, strict=True)]
        finished, slots = here.finished.tolist(), here.group.tolist()
        for slot, rows in itertools.groupby(range(len(self)), key=slots.__getitem__):
            own = list(rows)
            yield Group(
                slot=slot,
                prompt=self.prompts[own[0]],
                prompt_ids=tuple(here.prompt_ids[own[0]][here.prompt_mask[own[0]]].tolist()),
                ids=tuple(drawn[row] for row in own),
                texts=tuple(self.texts[row] for row in own),
                finished=tuple(finished[row] for row in own),
            )


def _take(value: Any, index: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, tuple) and len(value) == rows:
        return tuple(value[i] for i in index.tolist())
    return value
