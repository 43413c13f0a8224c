"""PPO (Schulman et al. 2017) as Ziegler et al. 2019 brought it to language models: actor, critic, a clipped ratio.

Token rewards are −β·log π/π_ref, and the reward model's score on the last token; advantages are GAE(γ, λ) over them.
With one epoch, one minibatch, γ = λ = 1 and V = 0 its gradient is REINFORCE's with to-go credit and no baseline; with
a V that learns it is a2c, REINFORCE with the value model as its baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.interfaces import Collective, Need, Passes, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import baselines, kl, losses, returns
from rlhf.rollout import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Ppo:
    """The objective of recipe sections ``ppo`` and ``value``.

    clip: of the ratio π/π_old, a token. value_clip: of the critic's change. value_coefficient: weight of its loss; it
    matters beside gradient clipping, and where the critic is a head on the policy's own trunk. epochs, minibatches:
    passes over a rollout and their steps; stop_kl ends the passes once the policy has moved so far (nats a completion).
    target: KL that beta is adapted toward, nats a completion (None: beta is fixed). whiten_advantages: shifted and
    scaled to mean 0 and variance 1 over the tokens of the step. whiten_rewards: token rewards to variance 1, their mean
    kept. warmup_steps: the first rollouts train the critic alone. mismatch_cap: largest weight of a token for what its
    sampler computed otherwise (``maths.losses.mismatch_weights``).
    """

    beta: float = 0.05
    clip: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    epochs: int = 2
    minibatches: int = 1
    stop_kl: float | None = None
    target: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = False
    warmup_steps: int = 0
    temperature: float = 1.0
    mismatch_cap: float | None = None
    name: str = "ppo"
    needs: frozenset[Need] = frozenset({"scores", "reference", "old_logprobs", "values"})
    unit: Unit = "completion"

    @property
    def request(self) -> StatsRequest:
        return StatsRequest(temperature=self.temperature, entropy=True, values=True)

    @property
    def passes(self) -> Passes:
        return Passes(epochs=self.epochs, minibatches=self.minibatches, stop_kl=self.stop_kl)

    def count(self, batch: TokenBatch) -> Tensor:
        """Completions, as everywhere here: a mean over tokens would weigh long completions by their length."""
        return batch.valid.sum()

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Advantages [B, C] and returns [B, C] of the policy that sampled, and the coefficient of the next step."""
        assert rollout.values is not None
        beta = self.beta if self.target is None or state.beta is None else state.beta
        mask = rollout.completion_mask & rollout.valid[:, None]
        rewards = self.token_rewards(rollout, beta)
        if self.whiten_rewards:
            rewards = baselines.whitened(rewards, mask, total=collective.sum, keep_mean=True)
        advantages, targets = returns.gae(rewards, rollout.values, rollout.completion_mask, self.gamma, self.gae_lambda)
        if self.whiten_advantages:
            advantages = baselines.whitened(advantages, mask, total=collective.sum)
        warming = state.step < self.warmup_steps
        if warming:
            advantages = torch.zeros_like(advantages)  # no gradient, and Adam does not move what has never had one
        if self.target is not None and not warming:
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
        assert batch.values is not None and batch.returns is not None
        mask, valid = batch.completion_mask, batch.valid
        policy, _ = self._surrogate(stats, batch)
        value = losses.value_loss_sum(stats.values, batch.values, batch.returns, mask, self.value_clip, valid)
        return {"policy": policy, "value": self.value_coefficient * value}

    def diagnostics(self, stats: TokenStats, batch: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Share of tokens whose gradient the clip removed: under .05 where steps have the right size."""
        _, cut = self._surrogate(stats, batch)
        return {"policy/clip_fraction": (cut, (batch.completion_mask & batch.valid[:, None]).sum())}

    def _surrogate(self, stats: TokenStats, batch: Rollout) -> tuple[Tensor, Tensor]:
        assert batch.old_logprobs is not None and batch.advantages is not None
        mask, old, advantages = batch.completion_mask, batch.old_logprobs, batch.advantages
        if self.mismatch_cap is not None:
            assert batch.rollout_logprobs is not None
            advantages = advantages * losses.mismatch_weights(old, batch.rollout_logprobs, mask, self.mismatch_cap)
        return losses.clipped_surrogate_sum(stats.logprobs, old, advantages, mask, batch.valid, self.clip, self.clip)


def _log_ratio(rollout: Rollout) -> Tensor:
    assert rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    return torch.where(rollout.completion_mask, rollout.old_logprobs - rollout.ref_logprobs, 0.0)


def _mean_kl(rollout: Rollout, collective: Collective) -> float:
    """Nats a completion, over all processes."""
    kept = torch.where(rollout.valid, _log_ratio(rollout).sum(1).double(), 0.0)
    total, count = collective.sum(torch.stack([kept.sum(), rollout.valid.sum().double()])).tolist()
    return float(total / count) if count else 0.0
