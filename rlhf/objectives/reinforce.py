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

from rlhf.interfaces import Collective, Need, Passes, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import baselines, kl, losses, variance
from rlhf.maths.masking import masked_var
from rlhf.rollout import Rollout, TokenBatch

Baseline = Literal[
    "none",
    "moving_average",
    "batch_mean",
    "group_mean",
    "leave_one_out",
    "shrinkage",
    "greedy",
    "value",
    "optimal_token",
]
DivideBy = Literal["none", "group_std", "batch_std"]
Average = Literal["completions", "completion_tokens", "tokens"]
_TINY = 1e-6  # added to a standard deviation: where rewards do not differ, advantages are 0 and stay it
# Baselines whose penalized form splits exactly into a score part and a KL part that needs its own group only.
_LINEAR_IN_GROUP = ("none", "leave_one_out", "greedy")


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """The objective of recipe section ``reinforce`` with the settings of ``kl``.

    beta: KL coefficient. estimator: ``k1`` (the sampled log-ratio, in the reward, no gradient) or ``exact`` (full
    vocabulary, differentiated, plus the future KL in the advantage; design: docs/algorithms.md). credit: ``sequence``
    or ``to_go`` (not read by ``exact``). loss_beta, loss_estimator: a second KL term inside the loss.
    divide_by: a standard deviation that advantages are divided by (biased by group, see ``maths.baselines.group_std``);
    where the KL is one number a completion it is divided with the rest, elsewhere beta keeps its meaning.
    average: what the loss is a mean over: completions (log π a sum over tokens), all tokens, or completions with log π
    a mean over the completion's own tokens (biased, see ``maths.losses.length_normalised``).
    updates_per_rollout: more than one makes later updates off-policy; rows are then weighted by the ratio of whole
    completions, at most importance_cap (``mask``: 0 beyond it), with advantages and KL from the current policy and the
    baseline kept.
    stale: completions are of an older policy, which gave them ``old_logprobs``: the first update weighs them too.
    mismatch_cap: largest weight of a token for what its sampler computed otherwise (``maths.losses.mismatch_weights``).
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
    divide_by: DivideBy = "none"
    average: Average = "completions"
    updates_per_rollout: int = 1
    importance_cap: float = 5.0
    importance: Literal["truncate", "mask"] = "truncate"
    mismatch_cap: float | None = None
    stale: bool = False
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
        if self._off_policy:
            needs.add("old_logprobs")
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
    def _off_policy(self) -> bool:
        """Whether an update sees completions of another policy than its own."""
        return self.updates_per_rollout > 1 or self.stale

    @property
    def _penalizes_before_the_update(self) -> bool:
        """Whether ``prepare`` itself needs penalized rewards: the baseline does not split into score and KL."""
        whole = self.baseline not in _LINEAR_IN_GROUP or self.divide_by != "none"
        return self.beta > 0 and self.penalizes_sequences and whole

    @property
    def passes(self) -> Passes:
        return Passes(epochs=self.updates_per_rollout)

    def count(self, batch: TokenBatch) -> Tensor:
        """Completions, or all their tokens where the loss is a mean over those."""
        if self.average == "tokens":
            return (batch.completion_mask & batch.valid[:, None]).sum()
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
        scale = self._scale(signal - baseline, everywhere) if self.divide_by != "none" else None
        if scale is not None:
            advantages = advantages * scale
        if self.baseline == "moving_average":
            state = replace(
                state,
                moving_average=baselines.update_moving_average(
                    state.moving_average, everywhere.rewards, everywhere.valid
                ),
            )
        return replace(rollout, baseline=baseline, advantages=advantages, advantage_scale=scale), state

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

    def _scale(self, difference: Tensor, everywhere: _Everywhere) -> Tensor:
        """[B]: 1 / (std + tiny): of the prompt's signal, or of what the baseline left of it in the whole batch."""
        if self.divide_by == "group_std":
            std = everywhere.mine(baselines.group_std(everywhere.rewards, everywhere.group, everywhere.valid))
        else:
            whole = everywhere.gather(difference)
            std = masked_var(whole.double(), everywhere.valid).sqrt().to(difference.dtype).expand_as(difference)
        return (std + _TINY).reciprocal()

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
            "group_mean": lambda: baselines.group_mean(rewards, group, valid),
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
        weight = self._weight(stats, batch)
        if self.beta > 0:
            advantages = advantages - self.beta * self._kl_advantage(stats, batch)
        if weight is not None:
            advantages = advantages * weight[:, None]
        if self.mismatch_cap is not None:
            advantages = advantages * self._mismatch(stats, batch, self.mismatch_cap)
        sums["policy"] = losses.policy_gradient_sum(stats.logprobs, advantages, mask, valid)
        if self.beta > 0 and self.estimator == "exact":
            assert stats.kl is not None
            sums["kl"] = self.beta * kl.exact_local_loss_sum(stats.kl, mask, valid, weight)
        if self.loss_beta > 0:
            sums["kl_loss"] = self.loss_beta * self._kl_loss(stats, batch, weight)
        return sums

    def _weight(self, stats: TokenStats, batch: Rollout) -> Tensor | None:
        """[B]: the importance weight of each completion over its length, as far as the settings ask for them."""
        weight = None
        if self._off_policy:
            weight, _ = self._importance(stats, batch)
        if self.average == "completion_tokens":
            even = torch.ones_like(stats.logprobs[:, 0]) if weight is None else weight
            weight = losses.length_normalised(even, batch.completion_mask)
        return weight

    def _importance(self, stats: TokenStats, batch: Rollout) -> tuple[Tensor, Tensor]:
        assert batch.old_logprobs is not None
        mask, old, cap = batch.completion_mask, batch.old_logprobs, self.importance_cap
        return losses.sequence_importance_weights(stats.logprobs, old, mask, batch.valid, cap, self.importance)

    def _mismatch(self, stats: TokenStats, batch: Rollout, cap: float) -> Tensor:
        """[B, C]. At the first update the forward's own logprobs are those of the policy that sampled."""
        assert batch.rollout_logprobs is not None
        own = stats.logprobs if batch.old_logprobs is None else batch.old_logprobs
        return losses.mismatch_weights(own, batch.rollout_logprobs, batch.completion_mask, cap)

    def diagnostics(self, stats: TokenStats, batch: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
        """Share of completions whose importance weight was cut."""
        if not self._off_policy:
            return {}
        return {"policy/importance_cut_rate": (self._importance(stats, batch)[1], batch.valid.sum())}

    def _kl_advantage(self, stats: TokenStats, batch: Rollout) -> Tensor:
        """[B, C] nats: the KL that a token is charged with, centred on its group where the baseline allows."""
        mask, group, valid = batch.completion_mask, batch.group, batch.valid
        if self.estimator == "exact":
            assert stats.kl is not None
            return kl.kl_penalty_advantage(
                stats.kl.detach(), mask, group, valid, credit="future", centre=self.baseline != "none"
            )
        log_ratio = kl.k1(stats.logprobs.detach(), _reference(stats, batch))
        here = self.baseline == "leave_one_out" and not self._penalizes_before_the_update
        centre = here if self.credit == "sequence" else self.baseline != "none"
        charged = kl.kl_penalty_advantage(log_ratio, mask, group, valid, credit=self.credit, centre=centre)
        scaled = self.penalizes_sequences and batch.advantage_scale is not None
        return charged * _column(batch.advantage_scale, charged) if scaled else charged  # type: ignore[arg-type]

    def _kl_loss(self, stats: TokenStats, batch: Rollout, weight: Tensor | None) -> Tensor:
        mask, valid = batch.completion_mask, batch.valid
        if self.loss_estimator == "exact_local":
            assert stats.kl is not None
            return kl.exact_local_loss_sum(stats.kl, mask, valid, weight)
        if self.loss_estimator == "k2":
            return kl.k2_sequence_loss_sum(stats.logprobs, _reference(stats, batch), mask, valid, weight)
        return kl.k3_token_loss_sum(stats.logprobs, _reference(stats, batch), mask, valid, weight)


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
