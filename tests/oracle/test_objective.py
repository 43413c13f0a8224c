"""The objective itself: closed form, gradient, and the score-function form of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.maths import baselines, losses

from .enumerable import BETA, Policy, Rows, cosine, expectation, reference_policy


def test_the_task_is_a_distribution() -> None:
    policy = reference_policy()
    assert len(policy.language.completions) == 40 and len(policy.language.prefixes) == 13
    torch.testing.assert_close(policy.probs.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-14)


def test_distance_to_the_optimum_is_beta_times_kl() -> None:
    """J* − J(π) = β·KL(π‖π*) for any π, with π* ∝ π_ref·exp(r/β) and J* = β·log Z."""
    policy = reference_policy()
    log_optimum = policy.ref_logprobs.sum(-1) + policy.rewards / BETA
    best = BETA * log_optimum.logsumexp(1)
    log_optimum = log_optimum.log_softmax(1)
    divergence = (policy.probs * (policy.logprobs.sum(-1) - log_optimum)).sum(1)
    torch.testing.assert_close(best - policy.value(BETA), BETA * divergence, rtol=0, atol=1e-12)


def test_gradient_agrees_with_finite_differences() -> None:
    """Central differences at 1e-5 are right to about 1e-10 in float64."""
    policy, step = reference_policy(), 1e-5
    gradient = policy.gradient(BETA).view_as(policy.logits)
    for at in ((0, 0, 0), (0, 5, 2), (3, 12, 3), (7, 1, 1)):
        nudge = torch.zeros_like(policy.logits)
        nudge[at] = step
        rise = policy.value(BETA, policy.logits + nudge) - policy.value(BETA, policy.logits - nudge)
        assert float(rise.sum() / (2 * step)) == pytest.approx(float(gradient[at]), abs=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reinforce_has_the_gradient_of_the_objective(temperature: float) -> None:
    """E[(R − b)·∇log π] = ∇J, b any number per prompt; at a temperature where it divides all logits."""
    base = reference_policy()
    policy = Policy(base.language, base.logits, base.ref_logits, base.rewards, temperature)
    rows = policy.every_completion()
    penalized = rows.rewards - BETA * rows.log_ratio.sum(1)
    constant = torch.arange(8.0, dtype=torch.float64)[rows.prompt]
    advantages = baselines.advantages(penalized, constant, rows.valid)

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    mean = expectation(policy.probs, policy.row_gradients(loss, rows).view(8, 40, -1))
    torch.testing.assert_close(mean, policy.gradient(BETA), rtol=0, atol=1e-12)


def test_a_temperature_used_in_sampling_only_turns_the_gradient() -> None:
    base = reference_policy()
    sampler = Policy(base.language, base.logits, base.ref_logits, base.rewards, 0.7)
    rows = base.every_completion()
    penalized = base.rewards - BETA * base.log_ratio
    advantages = (penalized - (base.probs * penalized).sum(1, keepdim=True)).flatten()

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    mean = expectation(sampler.probs, base.row_gradients(loss, rows).view(8, 40, -1))
    assert cosine(mean, base.gradient(BETA)) == pytest.approx(0.979, abs=5e-4)


def test_bradley_terry_labels_lead_to_the_same_optimum() -> None:
    """At π*, h = β·log π*/π_ref = r + const, and the population gradient of DPO's loss is 0 in every h."""
    policy = reference_policy()
    for rewards, ref in zip(policy.rewards, policy.ref_logprobs.sum(-1).exp(), strict=True):
        implicit = (rewards + 3.0).requires_grad_()
        pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40))
        chosen, rejected = (implicit[pairs[:, side]] for side in (0, 1))
        weight = (
            ref[pairs[:, 0]] * ref[pairs[:, 1]] * torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]]).detach()
        )
        by_chosen, by_rejected = torch.autograd.grad(losses.bradley_terry_sum(chosen, rejected), (chosen, rejected))
        total = torch.zeros(40, dtype=torch.float64)
        total.index_add_(0, pairs[:, 0], weight * by_chosen).index_add_(0, pairs[:, 1], weight * by_rejected)
        assert float(total.abs().max()) < 1e-12
