"""Common departures from REINFORCE turn the gradient; the numbers say how far, and that we would notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.maths import baselines, losses

from .enumerable import BETA, Loss, Policy, Rows, cosine, expectation, reference_policy


def with_ideal_baseline(shape: Callable[[Tensor, Rows], Tensor]) -> Loss:
    policy = reference_policy()
    penalized = policy.rewards - BETA * policy.log_ratio
    ideal = (policy.probs * penalized).sum(1)

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        advantages = baselines.advantages(penalized[rows.prompt, rows.completion], ideal[rows.prompt], rows.valid)
        return losses.policy_gradient_sum(logprobs, shape(advantages, rows), rows.mask, rows.valid)

    return loss


@pytest.mark.parametrize(
    ("shape", "direction"),
    [(lambda advantages, rows: advantages, 1.0), (lambda a, rows: losses.length_normalised(a, rows.mask), 0.967)],
    ids=["sum over tokens", "divided by the length"],
)
def test_dividing_by_the_length_turns_the_gradient(shape: Callable[[Tensor, Rows], Tensor], direction: float) -> None:
    policy = reference_policy()
    per_row = policy.row_gradients(with_ideal_baseline(shape), policy.every_completion()).view(8, 40, -1)
    tolerance = 1e-12 if direction == 1 else 5e-4
    assert cosine(expectation(policy.probs, per_row), policy.gradient(BETA)) == pytest.approx(direction, abs=tolerance)


def mean_over_groups(policy: Policy, loss: Loss, k: int) -> Tensor:
    """[P, D], by enumeration of all groups."""
    means = []
    for prompt in range(len(policy.probs)):
        rows, chance = policy.every_group(prompt, k)
        means.append(chance @ policy.group_gradients(loss, rows, k))
    return torch.stack(means)


@pytest.mark.parametrize(("k", "direction"), [(2, 0.8748), (3, 0.8832)])
def test_dividing_by_the_group_std_turns_the_gradient(k: int, direction: float) -> None:
    """GRPO's advantages. Leave-one-out on the same groups has cosine 1 (``test_unbiased``)."""

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        penalized = rows.rewards - BETA * rows.log_ratio.sum(1)
        advantages = baselines.group_standardised(penalized, rows.group, rows.valid)
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    policy = reference_policy()
    assert cosine(mean_over_groups(policy, loss, k), policy.gradient(BETA)) == pytest.approx(direction, abs=1e-4)
