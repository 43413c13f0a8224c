from __future__ import annotations

import math

import pytest
import torch

from rlhf.maths import variance


def test_group_norms_by_hand() -> None:
    """Gradients 1 and 3 (one parameter): mean 2, |G|² = 1·3 = 3, variance 2."""
    noise = variance.noise_from_group_norms(1 + 9, 16, 2)
    assert noise == (2, 3) and noise.scale == pytest.approx(2 / 3)


def test_batch_norms_by_hand() -> None:
    """|G|² = 1, trΣ = 8: batches of 2 and 8 groups have norms 1 + 4 and 1 + 1."""
    noise = variance.noise_from_batch_norms(5, 2, 2, 8)
    assert noise.signal == pytest.approx(1) and noise.trace == pytest.approx(8)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two groups"):
        variance.noise_from_group_norms(1, 1, 1)
    with pytest.raises(ValueError, match="smaller than"):
        variance.noise_from_batch_norms(1, 1, 8, 8)


def test_verdict_by_hand() -> None:
    """50 groups: one standard error of |G|² is √(2/2450)·trΣ = .02857·trΣ, two are .0571·trΣ."""
    assert str(variance.noise_verdict(variance.Noise(100.0, 6.0), 50)) == "16.7"
    weak = variance.noise_verdict(variance.Noise(100.0, 5.0), 50)
    assert not weak.significant and str(weak).startswith("> ")
    # G² with (G² − 5)² = 4·(2.857² + 8·G²): G² = 21 + √(441 − 25 + 32.65)
    assert weak.value == pytest.approx(100 / (21 + math.sqrt(441 - 25 + 4 * 100**2 * 2 / 2450)))


def test_more_rollouts_and_more_directions_make_a_verdict_possible() -> None:
    weak = variance.Noise(100.0, 1.0)
    assert not variance.noise_verdict(weak, 50).significant
    assert variance.noise_verdict(weak, 50, rollouts=100).significant
    assert variance.noise_verdict(weak, 50, rank=100).significant
    bounds = [variance.noise_verdict(variance.Noise(100.0, 0.0), 50, rollouts=m).value for m in (1, 10, 100)]
    assert bounds == sorted(bounds)


def test_verdict_on_nothing_and_on_a_negative_signal() -> None:
    assert str(variance.noise_verdict(variance.Noise(0.0, 0.0), 8)) == "> 0"
    assert variance.noise_verdict(variance.Noise(0.0, 2.0), 8) == variance.NoiseVerdict(0.0, True)
    negative = variance.noise_verdict(variance.Noise(100.0, -50.0), 50)
    assert not negative.significant and 0 < negative.value < math.inf
    assert variance.Noise(1.0, -1.0).scale == math.inf


def test_best_k_by_hand() -> None:
    assert variance.best_k(9.0, 1.0) == 4
    assert variance.best_k(9.0, 0.0) == math.inf
    assert variance.total_variance(2.0, 9.0, 1.0, 4) == 2 + 3 + 4


def test_leave_one_out_variance_by_hand() -> None:
    """Two equally likely actions, scores ±1, rewards ±1: R·g = 1 always, so m = 1 and the ideal variance is 0.

    k = 2: the group's gradient is 2·½·2·½… = 2 if the actions differ and 0 if not: mean 1, variance 1, times k = 2.
    """
    one = torch.tensor(1.0)
    assert variance.leave_one_out_variance(one, one, one, one, 2).item() == 2
    assert variance.leave_one_out_price(one, one, one).item() == 2


def test_second_moment_by_hand() -> None:
    norms = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [1.0, 1.0]])
    mask, valid = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), torch.tensor([True, True, False])
    found = variance.second_moment_sum(torch.tensor([2.0, 3.0, float("nan")]), norms, mask, valid)
    assert found.item() == 4 * 3 + 9 * 3
    per_token = torch.tensor([[2.0, 1.0], [3.0, float("nan")], [9.0, 9.0]])
    assert variance.second_moment_sum(per_token, norms, mask, valid).item() == 4 + 2 + 27


def test_zero_variance_groups_are_those_whose_valid_rewards_agree() -> None:
    """Group 0 agrees; group 1 differs; group 2 agrees once its unscorable row is left out; group 3 is a single row."""
    rewards = torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 4.0, math.nan, 5.0])
    group = torch.tensor([7, 7, 3, 3, 9, 9, 9, 1])
    alike = variance.zero_variance(rewards, group, rewards.isfinite())
    assert alike.tolist() == [True, True, False, False, True, True, False, False]
