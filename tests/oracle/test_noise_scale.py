"""The gradient noise scale where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.maths import variance

from .enumerable import draw_groups, reference_policy
from .test_unbiased import LEAVE_ONE_OUT


def gaussian(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """True gradient [200] and noise variances [200] with B_simple near 100."""
    generator = torch.Generator().manual_seed(seed)
    gradient = 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)
    spread = 0.5 + torch.rand(200, generator=generator, dtype=torch.float64)
    return gradient, spread, generator


@pytest.mark.parametrize("seed", range(5))
def test_two_batch_sizes(seed: int) -> None:
    """Batches of 8 and 256 groups, 1,000 of each. The estimate's standard deviation is about 0.8 % there."""
    gradient, spread, generator = gaussian(seed)

    def mean_norm(batch: int) -> float:
        noise = torch.randn(1000, 200, generator=generator, dtype=torch.float64) * (spread / batch).sqrt()
        return float((gradient + noise).square().sum(1).mean())

    noise = variance.noise_from_batch_norms(mean_norm(8), mean_norm(256), 8, 256)
    assert noise.scale == pytest.approx(float(spread.sum() / gradient.square().sum()), rel=0.03)


def test_both_forms_agree_on_the_same_gradients() -> None:
    """b = 1 (single groups) and B = n give the U-statistic."""
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares, square = float(gradients.square().sum()), float(gradients.sum(0).square().sum())
    pairs = variance.noise_from_group_norms(squares, square, 7)
    sizes = variance.noise_from_batch_norms(squares / 7, square / 49, 1, 7)
    assert pairs == pytest.approx(sizes, rel=1e-12)


def test_numerator_and_denominator_are_unbiased_by_enumeration() -> None:
    """All pairs of groups of 2 completions of one prompt: E|G|² and E trΣ to rounding."""
    policy = reference_policy()
    rows, chance = policy.every_group(0, 2)
    gradients = policy.group_gradients(LEAVE_ONE_OUT, rows, 2)
    mean = chance @ gradients
    squares = gradients.square().sum(1)
    trace = float(chance @ squares - mean.square().sum())
    # E over independent pairs of the two norms that the estimator is linear in.
    sum_of_squares = 2 * float(chance @ squares)
    square_of_sum = sum_of_squares + 2 * float(chance @ (gradients @ mean))
    noise = variance.noise_from_group_norms(sum_of_squares, square_of_sum, 2)
    assert noise.signal == pytest.approx(float(mean.square().sum()), rel=1e-12)
    assert noise.trace == pytest.approx(trace, rel=1e-12)


def test_on_the_task_64_groups_averaged_over_rollouts() -> None:
    """Prompt drawn uniformly, 4 completions: averages of 400 rollouts against the closed form of one group's trΣ."""
    policy, groups, k, rollouts = reference_policy(), 64, 4, 400
    pool = torch.stack(
        [
            policy.group_gradients(LEAVE_ONE_OUT, policy.groups(p, draw_groups(policy, p, 20_000, k, p)), k)
            for p in range(8)
        ]
    )
    generator = torch.Generator().manual_seed(0)
    trace = signal = 0.0
    for _ in range(rollouts):
        prompt = torch.randint(8, (groups,), generator=generator)
        drawn = pool[prompt, torch.randint(20_000, (groups,), generator=generator)]
        total = torch.zeros(8, drawn.shape[1], dtype=torch.float64).index_add_(0, prompt, drawn)
        noise = variance.noise_from_group_norms(float(drawn.square().sum()), float(total.square().sum()), groups)
        trace, signal = trace + noise.trace / rollouts, signal + noise.signal / rollouts
    truth = float(policy.gradient(0.5).square().sum()) / 8**2
    second = float(pool.square().sum(-1).mean())
    assert signal == pytest.approx(truth, rel=0.1)
    assert trace == pytest.approx(second - truth, rel=0.05)
    verdict = variance.noise_verdict(variance.Noise(trace, signal), groups, rollouts)
    assert verdict.significant and verdict.value == pytest.approx((second - truth) / truth, rel=0.15)


def test_pure_noise_gets_a_lower_bound_nineteen_times_in_twenty() -> None:
    """The worst case, all noise along one direction: P(χ²_1 − 1 > 2·√2) = .050."""
    groups, trials = 64, 4000
    drawn = torch.randn(trials, groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares, square = drawn.square().sum(1), drawn.sum(1).square()
    passed = sum(
        variance.noise_verdict(variance.noise_from_group_norms(float(a), float(b), groups), groups).significant
        for a, b in zip(squares, square, strict=True)
    )
    assert passed / trials == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / trials))


@pytest.mark.parametrize("true_scale", [4.0, 40.0, 400.0])
def test_what_is_said_is_rarely_wrong(true_scale: float) -> None:
    """ "> x" must hold: x above the true noise scale in fewer than one rollout of twenty, worst case noise."""
    groups, trials = 64, 4000
    noise = torch.randn(trials, groups, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = noise + math.sqrt(1 / true_scale)
    squares, square = drawn.square().sum(1), drawn.sum(1).square()
    wrong = 0
    for a, b in zip(squares, square, strict=True):
        verdict = variance.noise_verdict(variance.noise_from_group_norms(float(a), float(b), groups), groups)
        wrong += not verdict.significant and verdict.value > true_scale
    assert wrong / trials < 0.05
