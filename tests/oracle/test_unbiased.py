"""Bias by enumeration: the expected gradient over ALL groups, not a sample of them. Nothing here is random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from rlhf.maths import baselines, kl, losses

from .enumerable import BETA, Language, Loss, Policy, Rows, draw_groups, expectation, reference_policy

Baseline = Callable[[Tensor, Tensor, Tensor], Tensor]


def penalized(rows: Rows) -> Tensor:
    return rows.rewards - BETA * rows.log_ratio.sum(1)


def reinforce(baseline: Callable[[Rows, Tensor], Tensor]) -> Loss:
    """Sequence credit: the KL is part of the reward, the baseline sees both."""

    def loss(logprobs: Tensor, _: Tensor, rows: Rows) -> Tensor:
        rewards = penalized(rows)
        advantages = baselines.advantages(rewards, baseline(rows, rewards), rows.valid)
        return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

    return loss


def with_kl(credit: kl.Credit, centre: bool = True) -> Loss:
    """Scores with leave-one-out, the KL charged by ``kl_penalty_advantage``; ``future`` = the exact estimator."""

    def loss(logprobs: Tensor, exact: Tensor, rows: Rows) -> Tensor:
        where = (rows.mask, rows.group, rows.valid)
        score = baselines.advantages(rows.rewards, baselines.leave_one_out(rows.rewards, *where[1:]), rows.valid)
        charged = exact if credit == "future" else kl.k1(logprobs, rows.ref_logprobs)
        advantages = score[:, None] - BETA * kl.kl_penalty_advantage(charged, *where, credit=credit, centre=centre)
        total = losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)
        if credit == "future":
            total = total + BETA * kl.exact_local_loss_sum(exact, rows.mask, rows.valid)
        return total

    return loss


LEAVE_ONE_OUT = reinforce(lambda rows, rewards: baselines.leave_one_out(rewards, rows.group, rows.valid))
OPTIMAL_TOKEN = reinforce(
    lambda rows, rewards: baselines.optimal_token(rewards, rows.score_norms, rows.mask, rows.group, rows.valid)
)


def expected(policy: Policy, loss: Loss, prompt: int, k: int) -> Tensor:
    """[D]: E over all groups of k completions of the group's mean gradient."""
    rows, probs = policy.every_group(prompt, k)
    return (probs[:, None] * policy.group_gradients(loss, rows, k)).sum(0)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(
    "loss",
    [
        LEAVE_ONE_OUT,
        OPTIMAL_TOKEN,
        with_kl("sequence"),
        with_kl("to_go"),
        with_kl("to_go", centre=False),
        with_kl("future"),
        with_kl("future", centre=False),
    ],
    ids=["leave_one_out", "optimal_token", "k1 sequence", "k1 to_go", "k1 to_go, none", "exact", "exact, none"],
)
def test_every_group_of_a_prompt(loss: Loss, k: int) -> None:
    policy = reference_policy()
    truth = policy.gradient(BETA)
    for prompt in range(8) if k == 2 else (0, 5):
        assert float((expected(policy, loss, prompt, k) - truth[prompt]).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [2, 3])
def test_a_mean_that_includes_the_row_itself_is_a_shorter_step(k: int) -> None:
    """It gives (1 − 1/k) times leave-one-out, not only on average but group by group."""
    policy = reference_policy()
    rows, _ = policy.every_group(0, k)
    rewards = penalized(rows)
    exclusive = baselines.advantages(rewards, baselines.leave_one_out(rewards, rows.group, rows.valid), rows.valid)
    for group in range(0, len(rewards) // k, 97):
        own = rewards[group * k : (group + 1) * k]
        inclusive = own - baselines.batch_mean(own, torch.ones(k, dtype=torch.bool))
        torch.testing.assert_close(inclusive, (1 - 1 / k) * exclusive[group * k : (group + 1) * k], rtol=0, atol=1e-12)


def of_the_greedy_completion(policy: Policy) -> Tensor:
    """[P·N]: penalized reward of the prompt's greedy completion, once per row."""
    best = [policy.language.greedy(logits) for logits in policy.logits]
    reward = (policy.rewards - BETA * policy.log_ratio)[torch.arange(8), best]
    return reward.repeat_interleave(policy.probs.shape[1])


@pytest.mark.parametrize("name", ["none", "moving_average", "greedy", "value"])
def test_baselines_that_need_no_other_completion(name: str) -> None:
    policy = reference_policy()
    rows = policy.every_completion()
    rewards = penalized(rows)
    learned = torch.linspace(-2, 5, len(policy.language.prefixes), dtype=torch.float64)[policy.language.prefix_of]
    choices = {
        "none": baselines.none(rewards),
        "moving_average": baselines.moving_average(rewards, 1.7),
        "greedy": baselines.greedy(of_the_greedy_completion(policy)),
        "value": baselines.value(learned[rows.completion], rows.mask, rows.valid),  # any function of the prefix
    }
    loss = reinforce(lambda rows, rewards: choices[name])
    mean = expectation(policy.probs, policy.row_gradients(loss, rows).view(8, 40, -1))
    assert float((mean - policy.gradient(BETA)).abs().max()) < 1e-12


# ---- baselines that look at the whole batch: enumerate the whole batch


@lru_cache
def tiny_policy(longest: int) -> Policy:
    """Four prompts, two tokens: 2 completions (longest = 1) or 3 (longest = 2) a prompt."""
    language = Language(vocabulary=2, longest=longest)
    generator = torch.Generator().manual_seed(3)
    shape = (4, len(language.prefixes), 2)
    logits, ref = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    prompts = torch.tensor([[0.0], [2.0], [2.5], [-1.0]], dtype=torch.float64)
    rewards = prompts + torch.randn((4, len(language.completions)), generator=generator, dtype=torch.float64)
    return Policy(language, logits, ref, rewards)


def multisets(probs: Tensor, k: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Unordered draws of k completions with their probability: the order within a group changes no gradient."""
    for draw in itertools.combinations_with_replacement(range(len(probs)), k):
        orders = math.factorial(k) // math.prod(math.factorial(draw.count(value)) for value in set(draw))
        yield draw, orders * float(probs[list(draw)].prod())


def mean_over_batches(policy: Policy, sizes: Sequence[int], baseline: Baseline, unscored: int = 0) -> Tensor:
    """[P, D]: expected Σ over a prompt's completions of A·∇log π / size, over every possible batch.

    sizes: completions of each prompt; unscored: that many more rows of prompt 0 whose reward is NaN.
    """
    prompt = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    prompt = torch.cat([prompt, torch.zeros(unscored, dtype=torch.long)]).flip(0)
    valid = torch.tensor([True] * sum(sizes) + [False] * unscored).flip(0)
    total = torch.zeros(policy.scores.shape[:3], dtype=torch.float64)
    for batch in itertools.product(*(list(multisets(policy.probs[p], k)) for p, k in enumerate(sizes))):
        completion = torch.tensor([*itertools.chain(*(draw for draw, _ in batch)), *(0,) * unscored]).flip(0)
        rows = policy.rows(prompt, completion, 10 * prompt, valid)
        rewards = torch.where(valid, penalized(rows), torch.nan)

        def loss(logprobs: Tensor, _: Tensor, rows: Rows, rewards: Tensor = rewards) -> Tensor:
            advantages = baselines.advantages(rewards, baseline(rewards, rows.group, rows.valid), rows.valid)
            return losses.policy_gradient_sum(logprobs, advantages, rows.mask, rows.valid)

        weights = policy.descent(loss, rows)[0] * math.prod(chance for _, chance in batch)
        total.index_put_((prompt, completion), weights, accumulate=True)
    return torch.einsum("pnt,pntd->pd", total, policy.scores) / torch.tensor(sizes)[:, None]


def batch_mean(rewards: Tensor, _: Tensor, valid: Tensor) -> Tensor:
    return baselines.batch_mean(rewards, valid)


@pytest.mark.parametrize(("longest", "k"), [(2, 2), (1, 3)])
def test_shrinkage_over_every_batch(longest: int, k: int) -> None:
    policy = tiny_policy(longest)
    mean = mean_over_batches(policy, [k] * 4, baselines.shrinkage)
    assert float((mean - policy.gradient(BETA)).abs().max()) < 1e-12


def test_shrinkage_with_groups_of_different_sizes_and_unscored_rows() -> None:
    """One prompt with a single completion (the other prompts' mean), one with an unscorable row."""
    policy = tiny_policy(1)
    mean = mean_over_batches(policy, [2, 1, 3, 2], baselines.shrinkage, unscored=1)
    assert float((mean - policy.gradient(BETA)).abs().max()) < 1e-12


@pytest.mark.parametrize(("longest", "k"), [(2, 2), (1, 3)])
def test_batch_mean_over_every_batch_is_a_shorter_step(longest: int, k: int) -> None:
    """Exactly (1 − 1/B) of the gradient, B = 4·k."""
    policy = tiny_policy(longest)
    mean = mean_over_batches(policy, [k] * 4, batch_mean)
    assert float((mean - (1 - 1 / (4 * k)) * policy.gradient(BETA)).abs().max()) < 1e-12


def test_batch_mean_with_unscored_rows_counts_scored_ones() -> None:
    policy = tiny_policy(1)
    mean = mean_over_batches(policy, [2, 1, 3, 2], batch_mean, unscored=2)
    assert float((mean - (1 - 1 / 8) * policy.gradient(BETA)).abs().max()) < 1e-12


def test_shrinkage_that_saw_its_own_group_would_be_caught() -> None:
    """The same mix with λ and mean from ALL groups is biased by far more than the tolerance above."""

    def inclusive(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        return 0.5 * baselines.leave_one_out(rewards, group, valid) + 0.5 * baselines.batch_mean(rewards, valid)

    policy = tiny_policy(2)
    mean = mean_over_batches(policy, [2] * 4, inclusive)
    assert float((mean - policy.gradient(BETA)).abs().max()) > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_shrinkage_given_the_other_groups(seed: int) -> None:
    """On the larger task: whatever the other seven groups drew, all pairs of prompt 0 average to its gradient."""
    policy, k = reference_policy(), 2
    others = torch.cat([draw_groups(policy, prompt, 1, k, seed)[0] for prompt in range(1, 8)])
    prompt = torch.arange(8).repeat_interleave(k)
    total = torch.zeros(policy.scores.shape[1:3], dtype=torch.float64)
    for own, chance in multisets(policy.probs[0], k):
        rows = policy.rows(prompt, torch.cat([torch.tensor(own), others]), prompt)
        loss = reinforce(lambda rows, rewards: baselines.shrinkage(rewards, rows.group, rows.valid))
        weights = policy.descent(loss, rows)[0][:k] * chance / k
        total.index_put_((rows.completion[:k],), weights, accumulate=True)
    mean = torch.einsum("nt,ntd->d", total, policy.scores[0])
    assert float((mean - policy.gradient(BETA)[0]).abs().max()) < 1e-12
