"""Every way to penalise KL against the enumerated ∇KL(π‖π_ref): direction, size and variance of one completion."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.maths import kl, losses
from rlhf.maths.masking import masked_sum

from .enumerable import Loss, Rows, cosine, expectation, reference_policy, relative_error, trace_covariance


def in_the_reward(charge: Callable[[Rows], Tensor]) -> Loss:
    """Σ c·log π with c detached: descending it lowers the KL."""
    return lambda logprobs, _, rows: losses.policy_gradient_sum(logprobs, -charge(rows), rows.mask, rows.valid)


def charged(credit: kl.Credit) -> Callable[[Rows], Tensor]:
    def charge(rows: Rows) -> Tensor:
        value = rows.kl if credit == "future" else kl.k1(rows.logprobs, rows.ref_logprobs)
        return kl.kl_penalty_advantage(value, rows.mask, rows.group, rows.valid, credit=credit, centre=False)

    return charge


def exact(logprobs: Tensor, live_kl: Tensor, rows: Rows) -> Tensor:
    return in_the_reward(charged("future"))(logprobs, live_kl, rows) + exact_local(logprobs, live_kl, rows)


def exact_local(_: Tensor, live_kl: Tensor, rows: Rows) -> Tensor:
    return kl.exact_local_loss_sum(live_kl, rows.mask, rows.valid)


def of_sequence(estimate: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Rows], Tensor]:
    return lambda rows: estimate(rows.logprobs.sum(1), rows.ref_logprobs.sum(1))


# loss, cosine to ∇KL, relative error, variance of one completion's gradient (None: not in the reference table)
TABLE: dict[str, tuple[Loss, float, float, float | None]] = {
    "k1 in reward, sequence": (in_the_reward(charged("sequence")), 1.0, 0.0, 0.6219),
    "k1 in reward, to-go": (in_the_reward(charged("to_go")), 1.0, 0.0, 0.4176),
    "exact": (exact, 1.0, 0.0, 0.0595),
    "exact_local": (exact_local, 0.9701, 0.244, 0.0362),
    "k2 loss, sequence": (
        lambda logprobs, _, rows: kl.k2_sequence_loss_sum(logprobs, rows.ref_logprobs, rows.mask, rows.valid),
        1.0,
        0.0,
        0.6219,
    ),
    "k2 loss, token": (
        lambda logprobs, _, rows: masked_sum(kl.k2(logprobs, rows.ref_logprobs), rows.mask),
        0.9701,
        0.244,
        0.2231,
    ),
    "k3 loss, token": (
        lambda logprobs, _, rows: kl.k3_token_loss_sum(logprobs, rows.ref_logprobs, rows.mask, rows.valid),
        0.939,
        0.437,
        None,
    ),
    "k3 loss, sequence": (
        lambda logprobs, _, rows: kl.k3(logprobs.sum(1), rows.ref_logprobs.sum(1)).sum(),
        0.924,
        0.484,
        None,
    ),
    "k2 in reward": (in_the_reward(of_sequence(kl.k2)), 0.19, math.nan, None),
    "k3 in reward": (in_the_reward(of_sequence(kl.k3)), -0.27, math.nan, None),
    "k1 in reward, token mean": (
        in_the_reward(lambda rows: losses.length_normalised(rows.log_ratio.sum(1), rows.mask)),
        0.946,
        0.536,
        None,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_kl_gradient_table(name: str) -> None:
    loss, direction, error, variance = TABLE[name]
    policy = reference_policy()
    per_row = -policy.row_gradients(loss, policy.every_completion()).view(8, 40, -1)
    mean, truth = expectation(policy.probs, per_row), policy.kl_gradient()
    assert cosine(mean, truth) == pytest.approx(direction, abs=1e-12 if direction == 1 else 5e-3)
    if not math.isnan(error):
        assert relative_error(mean, truth) == pytest.approx(error, abs=1e-12 if error == 0 else 1e-3)
    if variance is not None:
        assert trace_covariance(policy.probs, per_row) == pytest.approx(variance, abs=5e-5)


def test_k1_as_a_loss_does_nothing_on_average() -> None:
    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        return masked_sum(kl.k1(logprobs, rows.ref_logprobs), rows.mask)

    policy = reference_policy()
    mean = expectation(policy.probs, policy.row_gradients(loss, policy.every_completion()).view(8, 40, -1))
    assert float(mean.abs().max()) < 1e-15


def test_k3_on_the_sequence_has_the_forward_kl_gradient() -> None:
    """∇KL(π_ref‖π) = −E_ref[∇ log π]."""
    policy = reference_policy()
    loss = TABLE["k3 loss, sequence"][0]
    mean = -expectation(policy.probs, policy.row_gradients(loss, policy.every_completion()).view(8, 40, -1))
    forward = -expectation(policy.ref_logprobs.sum(-1).exp(), policy.scores.sum(2))
    torch.testing.assert_close(mean, forward, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("estimate", "spread"), [("k1", 0.5809), ("exact", 0.1122), ("k3", 0.3457)])
def test_values_are_unbiased_and_exact_has_the_least_spread(estimate: str, spread: float) -> None:
    policy = reference_policy()
    mask = policy.language.mask
    per_token = {
        "k1": kl.k1(policy.logprobs, policy.ref_logprobs),
        "exact": policy.exact_kl,
        "k3": kl.k3(policy.logprobs, policy.ref_logprobs),
    }[estimate]
    value = masked_sum(per_token, mask, dim=2)
    mean = (policy.probs * value).sum(1)
    torch.testing.assert_close(mean, (policy.probs * policy.log_ratio).sum(1), rtol=0, atol=1e-12)
    deviation = ((policy.probs * value.square()).sum(1) - mean.square()).sqrt()
    assert float(deviation.mean()) == pytest.approx(spread, abs=5e-5)


@pytest.mark.parametrize(
    ("shift", "name", "bias", "deviation"),
    [
        (0.1, "k1", 0.0, 20.0),
        (0.1, "k2", 0.0025, 1.42),
        (0.1, "k3", 0.0, 1.42),
        (1.0, "k1", 0.0, 2.0),
        (1.0, "k2", 0.25, 1.73),
        (1.0, "k3", 0.0, 1.70),
    ],
)
def test_schulmans_table(shift: float, name: str, bias: float, deviation: float) -> None:
    """Samples of N(0, 1), reference N(shift, 1): KL = shift²/2. By quadrature on a grid fine enough for 1e-10."""
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    value = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name](-0.5 * x.square(), -0.5 * (x - shift).square())
    truth = shift**2 / 2
    mean = (density * value).sum()
    assert float(mean / truth) - 1 == pytest.approx(bias, abs=1e-6)
    assert float(((density * value.square()).sum() - mean.square()).sqrt()) / truth == pytest.approx(
        deviation, abs=5e-3
    )
