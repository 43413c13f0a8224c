"""Figures of a ranking, on numbers that a reader can check by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.maths.ranking import (
    auc,
    calibration_error,
    confidence_buckets,
    correlation,
    mean_with_error,
    pair_accuracy,
    rule_accuracy,
)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_accuracy_and_its_binomial_error() -> None:
    found = pair_accuracy(t(1.0, 2.0, -1.0, 0.0))  # an equal score counts as wrong
    assert found.value == 0.5
    assert found.error == pytest.approx(math.sqrt(0.25 / 4))


def test_pairs_of_one_prompt_are_one_observation() -> None:
    margins, cluster = t(1, 1, -1, -1), torch.tensor([7, 7, 3, 3])
    assert pair_accuracy(margins, cluster).error == pytest.approx(math.sqrt(1.0**2 + 1.0**2) / 4)  # .354, not .25
    assert pair_accuracy(margins, torch.arange(4)).error == pair_accuracy(margins).error


def test_nothing_has_no_mean() -> None:
    assert math.isnan(mean_with_error(t()).value) and math.isnan(rule_accuracy(t(), t()))


def test_a_rule_tosses_a_coin_over_ties() -> None:
    assert rule_accuracy(t(3, 5, 2, 4), t(1, 6, 2, 4)) == (1 + 0 + 0.5 + 0.5) / 4


def test_buckets_by_confidence() -> None:
    odds = math.log(3)  # σ(log 3) = ¾
    margins = t(0.0, odds, -odds, odds, odds, -math.log(9), math.log(9), math.log(9))
    low, high = confidence_buckets(margins, 2)
    assert low.pairs == high.pairs == 4
    assert low.confidence == pytest.approx((0.5 + 0.75 * 3) / 4) and low.accuracy == 0.5  # margins 0, +, −, +
    assert high.confidence == pytest.approx((0.75 + 0.9 * 3) / 4) and high.accuracy == 0.75  # margins +, −, +, +
    assert confidence_buckets(margins[:1], 2) == []


def test_calibration_error_of_a_model_that_is_right_three_times_in_four_as_it_says() -> None:
    odds = math.log(3)
    assert calibration_error(confidence_buckets(t(odds, odds, odds, -odds), 1)) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(confidence_buckets(t(odds, odds, -odds, -odds), 1)) == pytest.approx(0.25)
    # two buckets of two pairs: |½ − ¾| and |1 − ¾|, weighted by ½ each
    assert calibration_error(confidence_buckets(t(odds, -odds, odds, odds), 2)) == pytest.approx(0.25)


def test_auc_is_the_share_of_all_pairs() -> None:
    positive, negative = t(3, 1, 2), t(0, 2, 1, 1)
    by_hand = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive.tolist() for n in negative.tolist()]
    found = auc(positive, negative)
    assert found.value == pytest.approx(sum(by_hand) / 12)  # (4 + 2 + 3.5) / 12
    # DeLong: shares beaten by the positives 1, ½, ⅞; of positives that beat the negatives 1, ½, ⅚, ⅚
    placements = t(1, 0.5, 0.875).var() / 3 + t(1, 0.5, 5 / 6, 5 / 6).var() / 4
    assert found.error == pytest.approx(math.sqrt(float(placements)))


def test_auc_error_is_that_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [auc(torch.randn(60, generator=generator) + 1, torch.randn(90, generator=generator)) for _ in range(400)]
    spread = float(t(*(draw.value for draw in draws)).std())
    claimed = float(t(*(draw.error for draw in draws)).mean())
    assert claimed == pytest.approx(spread, rel=0.12)  # the standard error of a spread over 400 draws is 3.5 %


def test_correlation() -> None:
    assert correlation(t(1, 2, 3), t(2, 4, 6)) == pytest.approx(1.0)
    assert correlation(t(1, 2, 3), t(1, 0, 1)) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(correlation(t(1, 2, 3), t(5, 5, 5)))
