"""PPO (Schulman et al. 2017) as Ziegler et al. 2019 brought it to language models: actor, critic, a clipped ratio.

Token rewards are −β·log π/π_ref, and the reward model's score on the last token; advantages are GAE(γ, λ) over them.
With one epoch, one minibatch, γ = λ = 1 and V = 0 its gradient is REINFORCE's with to-go credit and no baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlhf.interfaces import Collective, Need, Passes, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import baselines, kl, losses, returns
from rlhf.rollout import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Ppo:
    """The objective of recipe sections ``ppo`` and ``value``.

    clip: of the ratio π/π_old, a token. value_clip: of the critic's change. value_coefficient: weight of its loss; the
    weights are its own, so it matters beside gradient clipping only. passes: epochs over a rollout and their steps.
    target: KL that beta is adapted toward, nats a completion (None: beta is fixed). whiten: advantages of the step are
    shifted and scaled to mean 0 and variance 1 over its tokens.
    """

    beta: float = 0.05
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    passes: Passes = field(default_factory=lambda: Passes(epochs=2))
    target: float | None = None
    whiten: bool = False
    temperature: float = 1.0
    name: str = "ppo"
    needs: frozenset[Need] = frozenset({"scores", "reference", "old_logprobs", "values"})
    unit: Unit = "completion"

    @property
    def request(self) -> StatsRequest:
        return StatsRequest(temperature=self.temperature, entropy=True, values=True)

    def count(self, batch: TokenBatch) -> Tensor:
        """Completions, as everywhere here: a mean over tokens would weigh long completions by their length."""
        return batch.valid.sum()

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Advantages [B, C] and returns [B, C] of the policy that sampled, and the coefficient of the next step."""
        assert rollout.values is not None
        beta = self.beta if self.target is None or state.beta is None else state.beta
        mask = rollout.completion_mask & rollout.valid[:, None]
        rewards = self.token_rewards(rollout, beta)
        advantages, targets = returns.gae(rewards, rollout.values, rollout.completion_mask, self.gamma, self.lam)
        if self.whiten:
            advantages = baselines.whitened(advantages, mask, total=collective.sum)
        if self.target is not None:
            next_beta = kl.adapted_beta(beta, _mean_kl(rollout, collective), self.target)
            state, rollout = replace(state, beta=next_beta), replace(rollout, beta=beta)
        return replace(rollout, advantages=advantages, returns=targets), state

    def token_rewards(self, rollout: Rollout, beta: float) -> Tensor:
        """[B, C]: −β·log π_old/π_ref of each token, plus the completion's reward on its last one."""
        assert rollout.rewards is not None
        found = -beta * _log_ratio(rollout)
        last = rollout.completion_mask.sum(1) - 1
        rows = torch.nonzero(rollout.valid & (last >= 0))[:, 0]
        found[rows, last[rows]] += rollout.rewards[rows].to(found.dtype)
        return found

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """The clipped surrogate, and the critic's clipped squared error."""
        assert isinstance(batch, Rollout) and stats.values is not None
        assert batch.old_logprobs is not None and batch.advantages is not None
        assert batch.values is not None and batch.returns is not None
        mask, valid = batch.completion_mask, batch.valid
        policy, _ = losses.clipped_surrogate_sum(
            stats.logprobs, batch.old_logprobs, batch.advantages, mask, valid, self.clip, self.clip
        )
        value = losses.value_loss_sum(stats.values, batch.values, batch.returns, mask, self.value_clip, valid)
        return {"policy": policy, "value": self.value_coefficient * value}


def _log_ratio(rollout: Rollout) -> Tensor:
    assert rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    return torch.where(rollout.completion_mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0)


def _mean_kl(rollout: Rollout, collective: Collective) -> float:
    """Nats a completion, over all processes."""
    kept = torch.where(rollout.valid, _log_ratio(rollout).sum(1).double(), 0.0)
    total, count = collective.sum(torch.stack([kept.sum(), rollout.valid.sum().double()])).tolist()
    return float(total / count) if count else 0.0
