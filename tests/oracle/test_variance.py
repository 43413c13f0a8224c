"""What baselines and KL estimators cost in variance, and how many completions a prompt should get."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.maths import baselines, kl, losses, variance

from .enumerable import (
    BETA,
    Loss,
    Policy,
    Rows,
    draw_groups,
    reference_policy,
    sample_variance,
    shifted_policy,
    trace_covariance,
)
from .test_unbiased import LEAVE_ONE_OUT, of_the_greedy_completion, reinforce


@lru_cache
def moments() -> dict[str, Tensor]:
    """Per prompt [8]: E[(R − μ)²|g|²], σ², E|g|², |m|², and μ, from the whole distribution."""
    policy = reference_policy()
    rewards = policy.rewards - BETA * policy.log_ratio
    mean = (policy.probs * rewards).sum(1)
    squares = (rewards - mean[:, None]).square()
    norms = policy.scores.sum(2).square().sum(-1)
    return {
        "mean": mean,
        "second_moment": (policy.probs * squares * norms).sum(1),
        "reward_variance": (policy.probs * squares).sum(1),
        "score_norm": (policy.probs * norms).sum(1),
        "signal": policy.gradient(BETA).square().sum(1),
    }


def closed_form(k: int) -> Tensor:
    found = moments()
    return variance.leave_one_out_variance(
        found["second_moment"], found["reward_variance"], found["score_norm"], found["signal"], k
    )


def test_score_norms_are_the_squared_norms_of_the_scores() -> None:
    """Token by token, and summed over a completion because different prefixes own different parameters."""
    policy = reference_policy()
    torch.testing.assert_close(policy.score_norms, policy.scores.square().sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(policy.score_norms.sum(2), policy.scores.sum(2).square().sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_closed_form_of_leave_one_out_variance(k: int) -> None:
    """k·trCov of a group's gradient, enumerated over all groups."""
    policy, prompts = reference_policy(), range(8) if k == 2 else range(2)
    for prompt in prompts:
        rows, chance = policy.every_group(prompt, k)
        gradients = policy.group_gradients(LEAVE_ONE_OUT, rows, k)
        enumerated = chance @ gradients.square().sum(1) - (chance @ gradients).square().sum()
        assert k * float(enumerated) == pytest.approx(float(closed_form(k)[prompt]), rel=1e-12)


@pytest.mark.parametrize(("k", "published"), [(2, 2.30), (4, 1.57), (8, 1.36), (64, 1.225)])
def test_leave_one_out_variance_by_k(k: int, published: float) -> None:
    assert float(closed_form(k).mean()) == pytest.approx(published, abs=5e-3)


@pytest.mark.parametrize(
    ("name", "published"), [("none", 4.74), ("moving_average", 3.15), ("greedy", 2.39), ("value", 1.21)]
)
def test_variance_of_one_completion_by_baseline(name: str, published: float) -> None:
    policy, mean = reference_policy(), moments()["mean"]
    rows = policy.every_completion()
    baseline = {
        "none": baselines.none(rows.rewards),
        "moving_average": baselines.moving_average(rows.rewards, float(mean.mean())),
        "greedy": baselines.greedy(of_the_greedy_completion(policy)),
        "value": mean[rows.prompt],  # a learned value that has reached the truth
    }[name]
    per_row = policy.row_gradients(reinforce(lambda rows, rewards: baseline), rows).view(8, 40, -1)
    assert trace_covariance(policy.probs, per_row) == pytest.approx(published, abs=5e-3)


# ---- the best number of completions per prompt


@lru_cache
def budget() -> tuple[float, float, float]:
    """within, price, between for prompts drawn uniformly; a prompt's gradient fills its own block of parameters."""
    found = moments()
    price = variance.leave_one_out_price(found["reward_variance"], found["score_norm"], found["signal"])
    between = found["signal"].mean() - found["signal"].sum() / 8**2
    return float((found["second_moment"] - found["signal"]).mean()), float(price.mean()), float(between)


def test_best_k_is_four_here() -> None:
    within, price, between = budget()
    best = variance.best_k(price, between)
    assert best == pytest.approx(4.18, abs=5e-3)
    totals = {k: variance.total_variance(within, price, between, k) for k in (2, 3, 4, 5, 6, 8, 16)}
    published = {2: 2.517, 3: 2.079, 4: 2.005, 5: 2.022, 6: 2.076, 8: 2.230, 16: 3.014}
    assert totals == pytest.approx(published, abs=5e-4)
    for k in (best - 0.01, best + 0.01):
        assert variance.total_variance(within, price, between, k) > variance.total_variance(
            within, price, between, best
        )


@pytest.mark.parametrize("k", [2, 3])
def test_total_variance_by_enumeration(k: int) -> None:
    """One prompt at random, then k of its completions: N·trCov = k·trCov of that gradient."""
    policy = reference_policy()
    second, mean = 0.0, 0.0
    for prompt in range(8):
        rows, chance = policy.every_group(prompt, k)
        gradients = policy.group_gradients(LEAVE_ONE_OUT, rows, k)
        second += float(chance @ gradients.square().sum(1)) / 8
        mean += float((chance @ gradients).square().sum()) / 8**2  # blocks of different prompts are orthogonal
    assert k * (second - mean) == pytest.approx(variance.total_variance(*budget(), k), rel=1e-12)


# ---- credit, baseline and estimator of the KL, 20,000 groups of 4 a prompt


def leave_one_out_of(rewards: Tensor, rows: Rows) -> Tensor:
    return baselines.leave_one_out(rewards, rows.group, rows.valid)


def charge(value: Tensor, rows: Rows, credit: kl.Credit, centre: bool = True) -> Tensor:
    return kl.kl_penalty_advantage(value, rows.mask, rows.group, rows.valid, credit=credit, centre=centre)


def k1_with(credit: kl.Credit, beta: float) -> Loss:
    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        score = rows.rewards - leave_one_out_of(rows.rewards, rows)
        advantages = score[:, None] - beta * charge(rows.log_ratio, rows, credit)
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    return loss


def k1_to_go_with_a_sequence_baseline(beta: float) -> Loss:
    """What the recipe refuses: the baseline charges every token with a whole completion's KL."""

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        penalized = rows.rewards - beta * rows.log_ratio.sum(1)
        score = rows.rewards - leave_one_out_of(penalized, rows)
        advantages = score[:, None] - beta * charge(rows.log_ratio, rows, "to_go", centre=False)
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    return loss


def exact(beta: float) -> Loss:
    def loss(logprobs: Tensor, live_kl: Tensor, rows: Rows) -> Tensor:
        score = rows.rewards - leave_one_out_of(rows.rewards, rows)
        advantages = score[:, None] - beta * charge(rows.kl, rows, "future")
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid) + beta * kl.exact_local_loss_sum(
            live_kl, rows.mask, rows.valid
        )

    return loss


def measured(policy: Policy, loss: Loss, seed: int) -> float:
    """k·trCov of a group's mean gradient, mean over prompts. ``seed`` + prompt is the generator's seed."""
    k, found = 4, []
    for prompt in range(8):
        rows = policy.groups(prompt, draw_groups(policy, prompt, 20_000, k, seed + prompt))
        found.append(k * sample_variance(policy.group_gradients(loss, rows, k)))
    return sum(found) / len(found)


# Same draws as the published numbers, hence their three decimals.
CREDITS: list[tuple[float, Callable[[float], Loss], float]] = [
    (0.7, lambda beta: k1_with("sequence", beta), 1.631),
    (0.7, k1_to_go_with_a_sequence_baseline, 1.657),
    (0.7, lambda beta: k1_with("to_go", beta), 1.612),
    (3.0, lambda beta: k1_with("sequence", beta), 1.364),
    (3.0, k1_to_go_with_a_sequence_baseline, 1.995),
    (3.0, lambda beta: k1_with("to_go", beta), 1.427),
]


@pytest.mark.parametrize(
    ("shift", "loss", "published"),
    CREDITS,
    ids=[f"{name}, KL {size}" for size in (0.28, 2.2) for name in ("sequence", "to-go sequence baseline", "to-go")],
)
def test_variance_by_credit_and_baseline(shift: float, loss: Callable[[float], Loss], published: float) -> None:
    assert measured(shifted_policy(shift), loss(0.5), seed=10) == pytest.approx(published, abs=6e-4)


def test_exact_kl_makes_the_penalty_nearly_free() -> None:
    """β = 1, KL .94: k1 with sequence credit 3.5, exact 1.4, no penalty at all 1.33."""
    policy = shifted_policy(1.5)
    sequence = measured(policy, k1_with("sequence", 1.0), seed=0)
    free = measured(policy, k1_with("sequence", 0.0), seed=0)
    nearly_free = measured(policy, exact(1.0), seed=0)
    assert (sequence, nearly_free, free) == pytest.approx((3.522, 1.401, 1.326), abs=6e-4)
    assert nearly_free <= 0.45 * sequence


# ---- shrinkage, by the ledger


def ledger(k: int, spread_of_prompts: float, prompts: int = 64, batches: int = 300) -> dict[str, float]:
    """Mean second moment minus |m|² per completion, on batches of ``prompts`` groups (the ledger's number)."""
    policy, found, rng = reference_policy(), moments(), np.random.default_rng(0)
    mean = found["mean"]
    table = policy.rewards - BETA * policy.log_ratio - mean[:, None]
    table = table + spread_of_prompts * (mean - mean.mean())[:, None] + mean.mean() * spread_of_prompts
    probs = (policy.probs / policy.probs.sum(1, keepdim=True)).numpy()
    group = torch.arange(prompts).repeat_interleave(k)
    names = {"leave_one_out": baselines.leave_one_out, "shrinkage": baselines.shrinkage}
    total = dict.fromkeys(names, 0.0)
    for _ in range(batches):
        chosen = rng.integers(8, size=prompts)
        drawn = np.stack([rng.choice(40, size=k, p=probs[p]) for p in chosen])
        rows = policy.rows(torch.from_numpy(chosen).repeat_interleave(k), torch.from_numpy(drawn).flatten(), group)
        rewards = table[rows.prompt, rows.completion]
        for name, baseline in names.items():
            advantages = baselines.advantages(rewards, baseline(rewards, group, rows.valid), rows.valid)
            cost = variance.second_moment_sum(advantages, rows.score_norms, rows.mask, rows.valid)
            total[name] += float(cost) / (batches * len(group))
    return {name: value - float(found["signal"].mean()) for name, value in total.items()}


@pytest.mark.parametrize(
    ("k", "spread", "alone", "mixed"), [(2, 1.0, 2.130, 1.865), (4, 0.3, 1.525, 1.341)], ids=["k = 2", "weak means"]
)
def test_shrinkage_beats_leave_one_out(k: int, spread: float, alone: float, mixed: float) -> None:
    """Reference figures use λ without the error of the other groups' mean (σ²/k/(P − 1)): ours is lower by < .5 %."""
    found = ledger(k, spread)
    assert found["leave_one_out"] == pytest.approx(alone, abs=6e-4)
    assert 0.995 * mixed < found["shrinkage"] < mixed + 1e-3


def test_the_ledger_agrees_with_the_gradients_it_stands_for() -> None:
    """Second moment of one completion's gradient: exact here, where different tokens' scores are orthogonal."""
    policy = reference_policy()
    rows = policy.every_completion()
    rewards = rows.rewards - BETA * rows.log_ratio.sum(1)
    per_row = policy.row_gradients(reinforce(lambda rows, rewards: baselines.none(rewards)), rows)
    weight = math.sqrt(2.0)  # a common factor enters squared
    cost = variance.second_moment_sum(weight * rewards, rows.score_norms, rows.mask, rows.valid)
    assert float(cost) == pytest.approx(2 * float(per_row.square().sum()), rel=1e-12)
