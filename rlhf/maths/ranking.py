"""How well scores rank: accuracy of pairs, calibration, AUC, and what a cheap rule would have reached.

margins: [P] score of the preferred completion minus score of the other one. Everything is computed in float64 and
returned as plain floats: these are figures to read, nothing is differentiated. NaN where there is nothing to average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


class Bucket(NamedTuple):
    """Pairs of similar confidence. confidence: mean σ(|margin|). accuracy: share with margin > 0."""

    pairs: int
    confidence: float
    accuracy: float


def mean_with_error(values: Tensor, cluster: Tensor | None = None) -> Estimate:
    """Mean of [P] values and its standard error √(Σ_g (Σ_{i∈g} (v_i − mean))²)/P.

    cluster: [P] int64; values of one cluster (the pairs of a prompt) may depend on each other. With clusters of one,
    and values of 0 and 1, the error is the binomial √(p(1−p)/P).
    """
    values = values.double()
    if not len(values):
        return Estimate(math.nan, math.nan)
    mean = values.mean()
    deviation = values - mean
    if cluster is not None:
        inverse = torch.unique(cluster, return_inverse=True)[1]
        deviation = deviation.new_zeros(int(inverse.max()) + 1).index_add(0, inverse, deviation)
    return Estimate(float(mean), float(deviation.square().sum().sqrt()) / len(values))


def pair_accuracy(margins: Tensor, cluster: Tensor | None = None) -> Estimate:
    """Share of margins above 0; equal scores have not told the two apart and count as wrong."""
    return mean_with_error(margins > 0, cluster)


def rule_accuracy(preferred: Tensor, other: Tensor) -> float:
    """What a rule would reach that always prefers the larger value (the longer completion): [P], [P].

    A tie is a toss of a coin and counts ½: unlike a model, the rule has no score that could be called wrong.
    """
    wins = (preferred > other).double() + 0.5 * (preferred == other).double()
    return float(wins.mean()) if len(wins) else math.nan


def confidence_buckets(margins: Tensor, count: int = 4) -> list[Bucket]:
    """Pairs in ``count`` equal parts by |margin|, least confident first; [] with fewer pairs than parts.

    A Bradley–Terry model that prefers a completion by |margin| claims to be right with probability σ(|margin|). It is
    calibrated where ``accuracy`` equals ``confidence``. (σ of the signed margin would count its mistakes twice.)
    """
    if len(margins) < count:
        return []
    ordered = margins.double()[margins.abs().argsort(stable=True)]
    return [
        Bucket(len(part), float(part.abs().sigmoid().mean()), float((part > 0).double().mean()))
        for part in ordered.tensor_split(count)
    ]


def calibration_error(buckets: Sequence[Bucket]) -> float:
    """Σ_b (n_b/n)·|accuracy_b − confidence_b| (expected calibration error, Guo et al. 2017, eq. 3)."""
    total = sum(bucket.pairs for bucket in buckets)
    gaps = [bucket.pairs * abs(bucket.accuracy - bucket.confidence) for bucket in buckets]
    return sum(gaps) / total if total else math.nan


def auc(positive: Tensor, negative: Tensor) -> Estimate:
    """P(positive > negative) + ½·P(equal) over all [m] × [n] pairs, and DeLong's standard error (DeLong et al. 1988).

    By sorting: each text is scored once and no pair is formed. The error is NaN with fewer than two of either.
    """
    positive, negative = positive.double(), negative.double()
    if not len(positive) or not len(negative):
        return Estimate(math.nan, math.nan)
    above = _share_below(positive, negative)  # of each positive: the share of negatives it beats
    below = 1 - _share_below(negative, positive)  # of each negative: the share of positives that beat it
    if min(len(positive), len(negative)) < 2:
        return Estimate(float(above.mean()), math.nan)
    variance = above.var() / len(positive) + below.var() / len(negative)
    return Estimate(float(above.mean()), float(variance.sqrt()))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; NaN where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    return float((x * y).sum() / scale) if float(scale) > 0 else math.nan


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value the share of ``others`` below it, equal ones counted half."""
    ordered = others.sort().values
    left = torch.searchsorted(ordered, values, right=False)
    right = torch.searchsorted(ordered, values, right=True)
    return (left + right).double() / (2 * len(others))
