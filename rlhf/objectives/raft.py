"""RAFT (Dong et al. 2023): imitate the best of the k completions of each prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.interfaces import Collective, Need, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import losses
from rlhf.rollout import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Raft:
    """−log π of each prompt's best completion by r − β·log π/π_ref, a mean over prompts. Of equals the first."""

    beta: float = 0.05
    temperature: float = 1.0
    name: str = "raft"
    needs: frozenset[Need] = frozenset({"scores", "reference"})
    unit: Unit = "group"

    @property
    def request(self) -> StatsRequest:
        return StatsRequest(temperature=self.temperature, entropy=True)

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Advantage 1 for the best, 0 for the others. The KL is the sampler's: on-policy it is the policy's own."""
        assert rollout.rewards is not None and rollout.ref_logprobs is not None and rollout.rollout_logprobs is not None
        log_ratio = torch.where(rollout.completion_mask, rollout.rollout_logprobs - rollout.ref_logprobs, 0.0).sum(1)
        value = torch.where(rollout.valid, rollout.rewards - self.beta * log_ratio, -torch.inf)
        best = torch.zeros_like(value)
        for group in sorted(set(rollout.group.tolist())):
            rows = torch.nonzero(rollout.group == group)[:, 0]
            best[rows[value[rows].argmax()]] = 1.0
        return replace(rollout, advantages=torch.where(rollout.valid, best, 0.0)), state

    def count(self, batch: TokenBatch) -> Tensor:
        """Prompts."""
        assert isinstance(batch, Rollout) and batch.advantages is not None
        return batch.advantages.sum()

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        assert isinstance(batch, Rollout) and batch.advantages is not None
        loss = losses.policy_gradient_sum(stats.logprobs, batch.advantages, batch.completion_mask, batch.valid)
        return {"policy": loss}
