from __future__ import annotations

import math

import pytest
import torch

from rlhf.maths import logprobs

LOGITS = torch.log(torch.tensor([1.0, 2.0, 1.0]))  # π = ¼, ½, ¼; at temperature ½: 1/6, 4/6, 1/6


def test_token_logprobs_by_hand() -> None:
    targets = torch.tensor([0, 1])
    found = logprobs.token_logprobs(LOGITS.expand(2, 3), targets)
    torch.testing.assert_close(found, torch.log(torch.tensor([1 / 4, 1 / 2])))
    found = logprobs.token_logprobs(LOGITS.expand(2, 3), targets, temperature=0.5)
    torch.testing.assert_close(found, torch.log(torch.tensor([1 / 6, 4 / 6])))


def test_entropy_by_hand() -> None:
    assert logprobs.entropy(LOGITS).item() == pytest.approx(1.5 * math.log(2))
    assert logprobs.entropy(torch.zeros(2, 5)).tolist() == pytest.approx([math.log(5)] * 2)
    sharp = math.log(6) / 3 + (2 / 3) * math.log(1.5)
    assert logprobs.entropy(LOGITS, temperature=0.5).item() == pytest.approx(sharp)


def test_score_norms_are_squared_distances_to_the_chosen_corner() -> None:
    targets = torch.tensor([0, 1])
    by_hand = [9 / 16 + 1 / 4 + 1 / 16, 1 / 16 + 1 / 4 + 1 / 16]
    assert logprobs.score_norms(LOGITS.expand(2, 3), targets).tolist() == pytest.approx(by_hand)
    full = logprobs.log_softmax(LOGITS)
    formula = 1 - 2 * full.exp()[:2] + full.exp().square().sum()
    assert logprobs.score_norms_of(full.expand(2, 3), targets).tolist() == pytest.approx(formula.tolist())


def test_score_norms_keep_their_digits_where_a_token_is_certain() -> None:
    """π(y) = 1 − 2e-9: the norm is 6e-18, where 1 − 2π + Σπ² in float64 gives rounding noise of 1e-16."""
    logits = torch.tensor([math.log(1e9), 0.0, 0.0], dtype=torch.float64)
    assert logprobs.score_norms(logits, torch.tensor(0)).item() == pytest.approx(6e-18, rel=1e-6)
    assert logprobs.score_norms(logits.float(), torch.tensor(0)).item() > 0


def test_score_is_one_hot_minus_probabilities() -> None:
    """Logits 1, 2, 1, 1, action 1: the gradient of log π is [−.1749, .5246, −.1749, −.1749]."""
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0], requires_grad=True)
    (score,) = torch.autograd.grad(logprobs.token_logprobs(logits, torch.tensor(1)), logits)
    assert score.tolist() == pytest.approx([-0.1749, 0.5246, -0.1749, -0.1749], abs=5e-5)


def test_forbidden_tokens_contribute_nothing() -> None:
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    entropy = logprobs.entropy(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(entropy + logprobs.score_norms(logits, torch.tensor(0)), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("given", "kept"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_never_narrower_than_float32(given: torch.dtype, kept: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=given)
    assert logprobs.log_softmax(logits, 0.7).dtype == kept
    assert logprobs.token_logprobs(logits, torch.tensor([1])).dtype == kept
    assert logprobs.entropy(logits).dtype == kept
    assert logprobs.score_norms(logits, torch.tensor([1])).dtype == kept


def test_the_temperature_divides_after_widening() -> None:
    """5/0.7 is 7.15625 in bfloat16, which would move the result by 1e-5."""
    logits = torch.tensor([5.0, 0.0], dtype=torch.bfloat16)
    expected = -math.log1p(math.exp(-5 / 0.7))
    assert logprobs.token_logprobs(logits, torch.tensor(0), 0.7).item() == pytest.approx(expected, abs=1e-6)
