"""A decode loop for transformers models: each prompt is read once, rows leave when they stop, others take their place.

``generate`` reads a prompt once for each of its k completions, and decodes every row until the longest has stopped.
This loop prefills distinct prompts, copies their keys and values to k slots, and compacts the slots as rows end. The
noise of a token depends on where it stands and on nothing else, so the completions are those of ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models import masks
from rlhf.rollout import pad_rows
from rlhf.sampling.completions import Each
from rlhf.sampling.packed import one_token
from rlhf.sampling.slots import Captured, Slots

# (logits [n, V], rows [n], positions [n]) → tokens [n], log-probabilities [n]
Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Decoded:
    """ids [N, max_new] int64, logprobs [N, max_new] nats, lengths [N], finished [N] bool: ended at a stop id."""

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor


@dataclass(frozen=True)
class DecodeLoop:
    """lm: a transformers causal LM whose masks are ``known``. kv_bytes: most memory for keys and values; rows beyond it
    wait. prefill_tokens: prompt tokens of one forward, padding included. each: told of rows as they end."""

    lm: Any
    max_new_tokens: int
    stop_ids: Tensor
    choose: Choose
    kv_bytes: int = 4 * 2**30
    prefill_tokens: int = 16384
    each: Each | None = None

    def run(self, prompts: Sequence[Sequence[int]], prompt_of: Sequence[int]) -> Decoded:
        """One completion of ``prompts[prompt_of[i]]`` for each i, in that order."""
        state = _State.new(len(prompt_of), self.max_new_tokens, self.stop_ids, self.each)
        width = max(map(len, prompts)) + self.max_new_tokens
        slots = Slots(self._size(len(prompt_of), width), width, self.stop_ids.device)
        waiting = sorted(range(len(prompt_of)), key=lambda row: (len(prompts[prompt_of[row]]), prompt_of[row], row))
        rows = tokens = self.stop_ids.new_zeros(0)
        while waiting or slots.rows:
            free = slots.size - slots.rows
            if waiting and (not slots.rows or 4 * free >= slots.size):
                batch, waiting = self._batch(waiting[:free], prompts, prompt_of), waiting[free:]
                for entering in batch:
                    new, drawn = self._enter(entering, prompts, prompt_of, slots, state)
                    rows, tokens = torch.cat([rows, new]), torch.cat([tokens, drawn])
            if slots.rows:
                logits = self._step(tokens, slots)
                tokens, done = state.draw(self.choose, logits, rows)
                if bool(done.any()):
                    order = slots.release(done)
                    rows, tokens = rows[order], tokens[order]
        return Decoded(state.ids, state.logprobs, state.lengths, state.finished)

    def _size(self, rows: int, width: int) -> int:
        """Slots that fit into ``kv_bytes``; at least one."""
        config = self.lm.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        item = 4 if not torch.is_autocast_enabled(self.stop_ids.device.type) else 2
        slot = 2 * config.num_hidden_layers * config.num_key_value_heads * head * width * item
        return max(1, min(rows, int(self.kv_bytes // slot)))

    def _batch(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], prompt_of: Sequence[int]
    ) -> list[list[int]]:
        """Rows (shortest prompts first) cut so that the distinct prompts of a part stay within ``prefill_tokens``."""
        parts: list[list[int]] = []
        distinct: set[int] = set()
        for row in rows:
            wider = distinct | {prompt_of[row]}
            if parts and len(wider) * len(prompts[prompt_of[row]]) <= self.prefill_tokens:
                parts[-1].append(row)
                distinct = wider
            else:
                parts.append([row])
                distinct = {prompt_of[row]}
        return parts

    def _enter(
        self,
        entering: Sequence[int],
        prompts: Sequence[Sequence[int]],
        prompt_of: Sequence[int],
        slots: Slots,
        state: _State,
    ) -> tuple[Tensor, Tensor]:
        """Reads the rows' prompts, draws their first tokens, and gives those that go on a slot: (rows, tokens)."""
        device = self.stop_ids.device
        distinct = sorted({prompt_of[row] for row in entering})
        source = torch.tensor([distinct.index(prompt_of[row]) for row in entering], device=device)
        lengths = torch.tensor([len(prompts[at]) for at in distinct], device=device)
        captured, logits = self._prefill([prompts[at] for at in distinct], lengths)
        rows = torch.tensor(entering, device=device)
        tokens, done = state.draw(self.choose, logits[source], rows)
        going = source[~done]
        slots.admit(captured, going, lengths[going])
        return rows[~done], tokens[~done]

    def _prefill(self, prompts: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Captured, Tensor]:
        """Keys and values of whole prompts, and the logits [P, V] after each."""
        ids, _ = pad_rows(prompts, side="right")
        width, captured = ids.shape[1], Captured()
        at = torch.arange(width, device=lengths.device)
        distance = (at[:, None] - at[None, :])[None, None]
        hidden = self._forward(ids.to(lengths.device), at[None].expand(len(ids), -1), distance, captured)
        return captured, self._logits(hidden[torch.arange(len(ids), device=lengths.device), lengths - 1])

    def _step(self, tokens: Tensor, slots: Slots) -> Tensor:
        """[rows, V]: logits after one more token of each row."""
        columns, used = slots.open()
        distance = columns[:, None] - torch.arange(used, device=columns.device)[None]
        hidden = self._forward(tokens[:, None], columns[:, None], distance[:, None, None], slots)
        slots.close()
        return self._logits(hidden[:, 0])

    def _forward(self, ids: Tensor, positions: Tensor, distance: Tensor, cache: Captured | Slots) -> Tensor:
        """Final hidden states. distance [·, 1, q, k]: how far before its query a key stands; behind it, negative."""
        decoder = getattr(self.lm, self.lm.base_model_prefix)
        kind: Any = type(decoder)
        seen = masks.masks(self.lm, distance >= 0, distance)
        with one_token(self.lm.config.get_text_config()) if ids.shape[1] == 1 else nullcontext():
            found = decoder(
                input_ids=ids,
                attention_mask=seen,
                position_ids=positions,
                use_cache=True,
                **{_cache_argument(kind): cache},
            )
        hidden: Tensor = found.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm.lm_head(hidden)
        cap = getattr(self.lm.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


@lru_cache
def _cache_argument(decoder: type[nn.Module]) -> str:
    """What transformers calls the cache, which changed within version 5."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class _State:
    """What has been drawn of every row."""

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    finished: Tensor
    stop_ids: Tensor
    each: Each | None

    @classmethod
    def new(cls, rows: int, longest: int, stop_ids: Tensor, each: Each | None) -> _State:
        device = stop_ids.device
        ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
        return cls(
            ids,
            torch.zeros(rows, longest, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
            stop_ids,
            each,
        )

    def draw(self, choose: Choose, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each of ``rows`` [n], and whether it was the row's last."""
        positions = self.lengths[rows]
        tokens, logprobs = choose(logits, rows, positions)
        self.ids[rows, positions] = tokens
        self.logprobs[rows, positions] = logprobs.to(self.logprobs.dtype)
        self.lengths[rows] = positions + 1
        hit = torch.isin(tokens, self.stop_ids)
        self.finished[rows] = hit
        last = hit | (positions + 1 >= self.ids.shape[1])
        if self.each is not None:
            self._tell(self.each, rows[last])
        return tokens, last

    def _tell(self, each: Each, rows: Tensor) -> None:
        columns = (self.lengths[rows].tolist(), self.finished[rows].tolist(), self.ids[rows].tolist())
        for row, length, finished, ids in zip(rows.tolist(), *columns, strict=True):
            each(row, ids[:length], finished)
