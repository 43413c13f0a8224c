"""Held-out prompts, before training, on the way and after it, with the same sampling noise each time.

Common noise makes before and after paired: a completion changes only where the policy did, so the difference has a far
smaller standard error than two independent samples would give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.interfaces import Sampler, StatsRequest, TokenStats, TrainState
from rlhf.models.layout import plain_rows
from rlhf.models.policy import token_stats
from rlhf.models.reference import Reference
from rlhf.programs import measure
from rlhf.programs.session import Session
from rlhf.rewards.combine import RewardSet
from rlhf.rollout import Prompt, Rollout, TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import unwrap

NOISE_STEP = 0  # evaluation always draws with this step's noise; training steps count from 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One completion of each held-out prompt. prompts: all of them, on every rank. every_steps 0 = only the ends."""

    session: Session
    prompts: Sequence[Prompt]
    sampler: Sampler
    rewards: RewardSet
    reference: Reference
    temperature: float
    microbatch_tokens: int
    every_steps: int
    steps: int

    def before(self, model: nn.Module, state: TrainState) -> None:
        """Runs where training starts from nothing; a resumed run already has it in samples.jsonl."""
        if state.step == 0 and self.prompts:
            self._run(model, 0, "before")

    def maybe(self, model: nn.Module, step: int) -> None:
        if self.prompts and self.every_steps and step % self.every_steps == 0 and step != self.steps:
            self._run(model, step, "eval")

    def after(self, model: nn.Module, state: TrainState) -> None:
        if self.prompts:
            self._run(model, state.step, "after")

    def _run(self, model: nn.Module, step: int, phase: str) -> None:
        runtime = self.session.runtime
        own = range(runtime.rank, len(self.prompts), runtime.world_size)
        slots = list(own) or [0]  # a rank without prompts of its own repeats one: collectives need every rank
        prompts = [self.prompts[slot] for slot in slots]
        lm: nn.Module = unwrap(model).causal_lm  # type: ignore[assignment]
        rollout = self.rewards.score(self.sampler.sample(lm, prompts, slots, NOISE_STEP), step)
        stats = self._stats(model, rollout)
        rows = sample_rows(rollout, stats, len(rollout), self.rewards.extras()) if own else []
        gathered = [row for part in runtime.gather_objects(rows) for row in part]
        gathered.sort(key=lambda row: int(row["slot"]))
        self.session.samples(step, lambda: [{**row, "phase": phase} for row in gathered])
        self.session.evaluated(step, {**summarize(gathered), "eval/temperature": self.temperature})

    def _stats(self, model: nn.Module, rollout: Rollout) -> TokenStats:
        request = StatsRequest(temperature=self.temperature, entropy=True)

        def both(batch: TokenBatch) -> TokenStats:
            rows = plain_rows(batch)
            with torch.no_grad():
                policy = token_stats(model, rows, request)
            return policy._replace(ref_logprobs=self.reference.stats(rows, request).logprobs)

        with self.reference.use():
            return microbatches.score(rollout, both, self.microbatch_tokens, self.session.runtime)


def sample_rows(
    rollout: Rollout, stats: TokenStats, count: int, extras: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """The first ``count`` completions as the rows of samples.jsonl.

    extras: what reward functions gave to ``log_extra``, a value per row and column; what JSON has no word for is text.
    """
    assert rollout.rewards is not None
    kl = measure.sequence_kl(rollout, stats)
    return [
        {
            "slot": int(rollout.group[i]),
            "row_id": rollout.prompts[i].row_id,
            "prompt": shown(rollout.prompts[i]),
            "completion": rollout.texts[i],
            "tokens": int(rollout.completion_mask[i].sum()),
            "finished": bool(rollout.finished[i]),
            "reward": _number(rollout.rewards[i]),
            "kl": _number(kl[i]),
            "scores": {name: _number(score[i]) for name, score in rollout.scores.items()},
            **({"extra": {name: _plain(values[i]) for name, values in extras.items()}} if extras else {}),
        }
        for i in range(min(count, len(rollout)))
    ]


def shown(prompt: Prompt) -> str:
    """The prompt as a person reads it."""
    return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt.turns) if prompt.turns else prompt.text


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over evaluation rows, ``eval/…``; a mean over nothing is left out."""
    columns: dict[str, list[float | None]] = {
        "eval/reward_mean": [row["reward"] for row in rows],
        "eval/kl_reference": [row["kl"] for row in rows],
        "eval/length_mean": [float(row["tokens"]) for row in rows],
        "eval/eos_rate": [float(row["finished"]) for row in rows],
    }
    for name in rows[0]["scores"] if rows else ():
        columns[f"eval/{name}_mean"] = [row["scores"][name] for row in rows]
    found = {name: [v for v in values if v is not None] for name, values in columns.items()}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
