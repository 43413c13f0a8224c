"""REINFORCE with a baseline and a KL penalty toward the reference.

J(π) = E[r(x, y)] − β·KL(π‖π_ref),   ∇J = E[(r − β·log π/π_ref − b)·∇log π(y|x)]   (Williams 1992)

Two halves. ``prepare`` sees the whole global batch and subtracts the baseline from what the reward sources said.
``loss_sum`` sees one microbatch of whole groups and takes the KL penalty from the live logprobs, which on-policy makes
a separate old-logprob pass unnecessary: KL terms need only their own group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.interfaces import Collective, Need, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import baselines, kl, losses, variance
from rlhf.rollout import Rollout, TokenBatch

Baseline = Literal[
    "none", "moving_average", "batch_mean", "leave_one_out", "shrinkage", "greedy", "value", "optimal_token"
]
# Baselines whose penalized form splits exactly into a score part and a KL part that needs its own group only.
_LINEAR_IN_GROUP = ("none", "leave_one_out", "greedy")


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """The objective of recipe section ``reinforce`` with the settings of ``kl``.

    beta: KL coefficient. estimator: ``k1`` (the sampled log-ratio, in the reward, no gradient) or ``exact`` (full
    vocabulary, differentiated, plus the future KL in the advantage; design: docs/algorithms.md). credit: ``sequence``
    or ``to_go`` (not read by ``exact``). loss_beta, loss_estimator: a second KL term inside the loss.
    skip_zero_variance: groups whose rewards are all equal leave the step (Yu et al. 2025, §3.2, without sampling anew);
    with a KL penalty that biases it toward prompts whose completions differ.
    """

    beta: float = 0.05
    estimator: Literal["k1", "exact"] = "k1"
    credit: Literal["sequence", "to_go"] = "sequence"
    baseline: Baseline = "leave_one_out"
    loss_beta: float = 0.0
    loss_estimator: Literal["k2", "k3", "exact_local"] = "k2"
    temperature: float = 1.0
    skip_zero_variance: bool = False
    name: str = "reinforce"
    unit: Unit = "group"

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"scores"}
        # With beta 0 the reference is still scored: KL is what tells whether a run can be trusted.
        if self.request.reference:
            needs.add("reference_distribution")
        if not self.request.reference or self._penalizes_before_the_update:
            needs.add("reference")
        if self.baseline == "greedy":
            needs.add("greedy")
        if self.baseline == "optimal_token":
            needs.add("score_norms")
        return frozenset(needs)

    @property
    def request(self) -> StatsRequest:
        exact = self.estimator == "exact" or (self.loss_beta > 0 and self.loss_estimator == "exact_local")
        return StatsRequest(temperature=self.temperature, entropy=True, reference=exact)

    @property
    def penalizes_sequences(self) -> bool:
        """Whether the KL enters as one number a completion, so that the baseline acts on penalized rewards."""
        return self.estimator == "k1" and self.credit == "sequence"

    @property
    def _penalizes_before_the_update(self) -> bool:
        """Whether ``prepare`` itself needs penalized rewards: the baseline does not split into score and KL."""
        return self.beta > 0 and self.penalizes_sequences and self.baseline not in _LINEAR_IN_GROUP

    def count(self, batch: TokenBatch) -> Tensor:
        """Completions: the loss is a mean over them, with log π a sum over tokens."""
        return batch.valid.sum()

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Baseline and the score part of the advantages, over the global batch.

        Raises ValueError where rewards are missing.
        """
        if rollout.rewards is None:
            raise ValueError("score the rollout before prepare")
        rewards = rollout.rewards
        if self.skip_zero_variance:
            alike = variance.zero_variance(rewards, rollout.group, rollout.valid)
            rollout = replace(rollout, valid=rollout.valid & ~alike)
        signal = self._signal(rollout)
        everywhere = _Everywhere.of(rollout, signal, collective)
        baseline = self._baseline(rollout, signal, everywhere, state)
        advantages = baselines.advantages(rewards, baseline, rollout.valid)
        if self.baseline == "moving_average":
            state = replace(
                state,
                moving_average=baselines.update_moving_average(
                    state.moving_average, everywhere.rewards, everywhere.valid
                ),
            )
        return replace(rollout, baseline=baseline, advantages=advantages), state

    def _signal(self, rollout: Rollout) -> Tensor:
        """[B]: what the baseline predicts. Penalized rewards where the KL is one number a completion.

        The KL here comes from the sampler's logprobs: any baseline that does not depend on the completion is unbiased,
        and this one costs no forward. (Leave-one-out takes its KL part from the live logprobs instead, exactly.)
        """
        assert rollout.rewards is not None
        if not self._penalizes_before_the_update:
            return rollout.rewards
        behaviour = rollout.old_logprobs if rollout.old_logprobs is not None else rollout.rollout_logprobs
        if behaviour is None or rollout.ref_logprobs is None:
            raise ValueError(f"baseline {self.baseline} with a KL penalty needs logprobs of sampler and reference")
        log_ratio = torch.where(rollout.completion_mask, behaviour - rollout.ref_logprobs, 0.0)
        return rollout.rewards - self.beta * log_ratio.sum(1)

    def _baseline(self, rollout: Rollout, signal: Tensor, everywhere: _Everywhere, state: TrainState) -> Tensor:
        """[B], or [B, C] for ``optimal_token``."""
        rewards, group, valid = everywhere.rewards, everywhere.group, everywhere.valid
        if self.baseline == "greedy":
            if rollout.greedy_rewards is None:
                raise ValueError("baseline greedy needs greedy_rewards")
            return everywhere.mine(baselines.greedy(everywhere.gather(rollout.greedy_rewards)))
        if self.baseline == "optimal_token":
            if rollout.score_norms is None:
                raise ValueError("baseline optimal_token needs score_norms")
            mask = rollout.completion_mask
            return baselines.optimal_token(signal, rollout.score_norms, mask, rollout.group, rollout.valid)
        whole = {
            "none": lambda: baselines.none(rewards),
            "moving_average": lambda: baselines.moving_average(rewards, state.moving_average),
            "batch_mean": lambda: baselines.batch_mean(rewards, valid),
            "leave_one_out": lambda: baselines.leave_one_out(rewards, group, valid),
            "shrinkage": lambda: baselines.shrinkage(rewards, group, valid),
        }
        if self.baseline not in whole:
            raise ValueError(f"baseline {self.baseline!r} is not available to reinforce")
        return everywhere.mine(whole[self.baseline]())

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """−Σ A·log π, plus β·Σ exact KL, plus the loss-side KL; sums over the microbatch's valid completions."""
        assert isinstance(batch, Rollout) and batch.advantages is not None
        mask, valid = batch.completion_mask, batch.valid
        advantages = _column(batch.advantages, stats.logprobs).expand_as(stats.logprobs)
        sums: dict[str, Tensor] = {}
        if self.beta > 0:
            advantages = advantages - self.beta * self._kl_advantage(stats, batch)
        sums["policy"] = losses.policy_gradient_sum(stats.logprobs, advantages, mask, valid)
        if self.beta > 0 and self.estimator == "exact":
            assert stats.kl is not None
            sums["kl"] = self.beta * kl.exact_local_loss_sum(stats.kl, mask, valid)
        if self.loss_beta > 0:
            sums["kl_loss"] = self.loss_beta * self._kl_loss(stats, batch)
        return sums

    def _kl_advantage(self, stats: TokenStats, batch: Rollout) -> Tensor:
        """[B, C] nats: the KL that a token is charged with, centred on its group where the baseline allows."""
        mask, group, valid = batch.completion_mask, batch.group, batch.valid
        if self.estimator == "exact":
            assert stats.kl is not None
            return kl.kl_penalty_advantage(
                stats.kl.detach(), mask, group, valid, credit="future", centre=self.baseline != "none"
            )
        log_ratio = kl.k1(stats.logprobs.detach(), _reference(stats, batch))
        centre = self.baseline == "leave_one_out" if self.credit == "sequence" else self.baseline != "none"
        return kl.kl_penalty_advantage(log_ratio, mask, group, valid, credit=self.credit, centre=centre)

    def _kl_loss(self, stats: TokenStats, batch: Rollout) -> Tensor:
        mask, valid = batch.completion_mask, batch.valid
        if self.loss_estimator == "exact_local":
            assert stats.kl is not None
            return kl.exact_local_loss_sum(stats.kl, mask, valid)
        if self.loss_estimator == "k2":
            return kl.k2_sequence_loss_sum(stats.logprobs, _reference(stats, batch), mask, valid)
        return kl.k3_token_loss_sum(stats.logprobs, _reference(stats, batch), mask, valid)


@dataclass(frozen=True)
class _Everywhere:
    """Per-completion numbers of the global batch, and the way back to this rank's part."""

    rewards: Tensor
    group: Tensor
    valid: Tensor
    own: slice
    gather: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, rollout: Rollout, signal: Tensor, collective: Collective) -> _Everywhere:
        size = len(rollout)
        return cls(
            rewards=collective.gather(signal),
            group=collective.gather(rollout.group),
            valid=collective.gather(rollout.valid),
            own=slice(collective.rank * size, (collective.rank + 1) * size),
            gather=collective.gather,
        )

    def mine(self, value: Tensor) -> Tensor:
        return value[self.own]


def _column(value: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1] where ``like`` has a token axis."""
    return value[:, None] if value.dim() == 1 and like.dim() == 2 else value


def _reference(stats: TokenStats, batch: Rollout) -> Tensor:
    """[B, C] reference logprobs: from the same forward where it ran the reference, else from the scoring pass."""
    found = stats.ref_logprobs if stats.ref_logprobs is not None else batch.ref_logprobs
    if found is None:
        raise ValueError("the KL penalty needs the reference's logprobs")
    return found
