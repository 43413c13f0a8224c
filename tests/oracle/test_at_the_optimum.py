"""Which KL estimator is quieter depends on where the policy is: the exact one far from the optimum, k1 close to it.

At π*(y|x) ∝ π_ref·exp(r/β) the penalized reward r − β·log π/π_ref is β·log Z(x) for EVERY completion. k1 with sequence
credit then has no noise at all: its KL part cancels the score's completion by completion. The exact estimator knows the
expectation of the KL and so cannot cancel the score's noise, which stays.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from .enumerable import BETA, Loss, Policy, reference_policy
from .test_unbiased import LEAVE_ONE_OUT, with_kl

EXACT = with_kl("future")


@lru_cache
def between(share: float) -> Policy:
    """share 0: the reference; 1: the optimum for ``BETA``; between them logits are mixed."""
    task = reference_policy()
    optimum = (task.ref_logprobs.sum(-1) + task.rewards / BETA).log_softmax(1)
    logits = (1 - share) * task.ref_logits + share * _next_token_logits(task, optimum)
    return Policy(task.language, logits, task.ref_logits, task.rewards)


def _next_token_logits(task: Policy, logprob: Tensor) -> Tensor:
    """[P, prefixes, V]: log-probability mass of the completions that go on with each token."""
    language = task.language
    table = torch.full_like(task.logits, -torch.inf)
    for at, prefix in enumerate(language.prefixes):
        for token in range(language.vocabulary):
            longer = (*prefix, token)
            inside = [n for n, done in enumerate(language.completions) if done[: len(longer)] == longer]
            table[:, at, token] = logprob[:, inside].logsumexp(1)
    return table


def variance_of(loss: Loss, share: float) -> float:
    """k·trCov of a group's gradient, k = 2, all groups enumerated; mean over prompts."""
    policy, total = between(share), 0.0
    for prompt in range(8):
        rows, chance = policy.every_group(prompt, 2)
        gradients = policy.group_gradients(loss, rows, 2)
        total += 2 * float(chance @ gradients.square().sum(1) - (chance @ gradients).square().sum()) / 8
    return total


def test_the_mixture_ends_at_the_optimum() -> None:
    task, end = reference_policy(), between(1.0)
    penalized = task.rewards - BETA * end.log_ratio
    assert float((penalized - penalized[:, :1]).abs().max()) < 1e-12


def test_k1_with_sequence_credit_is_silent_at_the_optimum() -> None:
    assert variance_of(LEAVE_ONE_OUT, 1.0) < 1e-20
    assert variance_of(EXACT, 1.0) > 0.5


def test_at_the_reference_there_is_no_kl_to_estimate() -> None:
    assert variance_of(LEAVE_ONE_OUT, 0.0) == pytest.approx(variance_of(EXACT, 0.0), rel=1e-12)


@pytest.mark.parametrize(("share", "k1", "exact"), [(0.5, 0.551, 2.301), (0.9, 0.009, 0.930)])
def test_on_the_straight_way_there_k1_is_quieter(share: float, k1: float, exact: float) -> None:
    """A random step away from the reference has the opposite order (``test_variance``): 3.5 against 1.4."""
    assert variance_of(LEAVE_ONE_OUT, share) == pytest.approx(k1, abs=5e-4)
    assert variance_of(EXACT, share) == pytest.approx(exact, abs=5e-4)
