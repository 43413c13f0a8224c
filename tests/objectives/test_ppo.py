"""PPO: by hand, and its exact reduction to REINFORCE on a tiny Gemma."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.interfaces import Alone, TokenStats, TrainState
from rlhf.maths import losses
from rlhf.models.critic import Critic, ValueHead
from rlhf.models.layout import plain_rows
from rlhf.models.load import frozen_copy
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import build_reward_model
from rlhf.objectives.ppo import Ppo
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Rollout
from tests.objectives.by_hand import BETA, KL, by_row, hand_made, multipliers, near, without
from tests.support import fixed_rollout, policy_and_reference, tiny_config, tiny_lm, with_reference

ZERO = torch.zeros(5, 3)
PLAIN: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "epochs": 1}


def known(values: Tensor = ZERO, **more: Any) -> Rollout:
    return hand_made(old_logprobs=KL - 5, values=values, **more)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_score_is_on_the_last_token_and_the_kl_on_all() -> None:
    found = Ppo(beta=BETA).token_rewards(known(), BETA)
    assert by_row(found, known()) == [[-0.5, -1 + 1], [-1 + 2], [0, -0.5, 6], [-2 + 10], [-0.5, -0.5 + 21]]


def test_advantages_without_values_are_rewards_to_go() -> None:
    batch, _ = Ppo(beta=BETA, **PLAIN).prepare(known(), TrainState(), Alone())
    assert batch.advantages is not None and batch.returns is not None
    assert by_row(batch.advantages, batch) == [[-0.5, 0], [1], [5.5, 5.5, 6], [8], [20, 20.5]]
    assert torch.equal(batch.returns, batch.advantages)


def test_gae_by_hand() -> None:
    """Row 4: rewards −.5, 20.5; V = 4, 8; λ = 1/2: δ = −.5 + 8 − 4 = 3.5, 20.5 − 8 = 12.5; A = 3.5 + 6.25, 12.5."""
    values = torch.tensor([[4.0, 8, 0]]).repeat(5, 1)
    batch, _ = Ppo(beta=BETA, gae_lambda=0.5, gamma=1.0).prepare(known(values), TrainState(), Alone())
    assert batch.advantages is not None and batch.returns is not None
    assert by_row(batch.advantages, batch)[4] == [9.75, 12.5]
    assert by_row(batch.returns, batch)[4] == [13.75, 20.5]


def test_rows_without_a_score_have_no_gradient_and_spoil_nothing() -> None:
    objective = Ppo(beta=BETA)
    batch, _ = objective.prepare(without(known(), 1), TrainState(), Alone())
    stats = TokenStats(logprobs=(KL - 5).requires_grad_(), values=ZERO.clone().requires_grad_())
    sums = objective.loss_sum(stats, batch)
    gradients = torch.autograd.grad(sum(sums.values()), [stats.logprobs, stats.values])  # type: ignore[arg-type]
    for gradient in gradients:
        assert bool(gradient.isfinite().all()) and bool((gradient[1] == 0).all())
        assert bool((gradient[~batch.completion_mask] == 0).all())
    assert int(objective.count(batch)) == 4


def test_the_clip_cuts_what_has_moved_too_far() -> None:
    """π/π_old = e on every token: advantages above 0 have no gradient left, those below keep e·A."""
    objective = Ppo(beta=0.0, value_coefficient=1.0, **PLAIN)
    values = ZERO + 4.0
    batch, _ = objective.prepare(known(values), TrainState(), Alone())
    stats = TokenStats(logprobs=(KL - 4).requires_grad_(), values=values.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(objective.loss_sum(stats, batch)["policy"], stats.logprobs)
    e = float(torch.e)
    assert by_row(-gradient, batch) == near([[-3 * e] * 2, [-2 * e], [0, 0, 0], [0], [0, 0]])


def test_the_critics_loss() -> None:
    """½(V − G)² with G = the reward: V = 4 everywhere, rewards 1, 2, 6, 10, 21 on 2, 1, 3, 1, 2 tokens."""
    objective = Ppo(beta=0.0, value_coefficient=0.5, **PLAIN)
    values = ZERO + 4.0
    batch, _ = objective.prepare(known(values), TrainState(), Alone())
    found = objective.loss_sum(TokenStats(logprobs=KL - 5, values=values), batch)["value"]
    assert float(found) == pytest.approx(0.5 * 0.5 * (2 * 9 + 4 + 3 * 4 + 36 + 2 * 289))


def test_it_is_reinforce_to_go_by_hand() -> None:
    batch, _ = Ppo(beta=BETA, clip=0.0, **PLAIN).prepare(known(), TrainState(), Alone())
    stats = TokenStats(logprobs=(KL - 5).requires_grad_(), values=ZERO)
    (gradient,) = torch.autograd.grad(Ppo(beta=BETA, clip=0.0).loss_sum(stats, batch)["policy"], stats.logprobs)
    assert by_row(-gradient, batch) == near(
        multipliers(Reinforce(beta=BETA, baseline="none", credit="to_go"), hand_made())
    )


def test_whitened_advantages_by_hand() -> None:
    """Over the nine tokens of all rows; a row without a score is in nobody's mean."""
    objective = Ppo(beta=0.0, whiten_advantages=True, **PLAIN)
    batch, _ = objective.prepare(without(known(), 1), TrainState(), Alone())
    assert batch.advantages is not None
    kept = torch.tensor([1.0] * 2 + [6.0] * 3 + [10.0] + [21.0] * 2)
    expected = (kept - kept.mean()) / kept.std()
    found = torch.tensor([a for row in by_row(batch.advantages, batch) for a in row])
    assert found[2] == 0
    torch.testing.assert_close(torch.cat([found[:2], found[3:]]), expected, rtol=1e-5, atol=1e-6)


def test_whitened_rewards_keep_their_mean() -> None:
    """Nine token rewards, 1, 2, 6, 10, 21 and four 0, around 40/9."""
    objective = Ppo(beta=0.0, whiten_rewards=True, **PLAIN)
    batch, _ = objective.prepare(known(), TrainState(), Alone())
    rewards = torch.tensor([0.0, 1, 2, 0, 0, 6, 10, 0, 21])
    scaled = ((rewards - rewards.mean()) / rewards.std() + rewards.mean()).tolist()
    assert batch.advantages is not None
    to_go = [[scaled[0] + scaled[1], scaled[1]], [scaled[2]], [sum(scaled[3:6]), sum(scaled[4:6]), scaled[5]]]
    assert by_row(batch.advantages, batch)[:3] == near(to_go)


def test_the_critic_learns_alone_first() -> None:
    objective = Ppo(beta=BETA, warmup_steps=2, **PLAIN)
    for step, learns in ((0, False), (1, False), (2, True)):
        batch, _ = objective.prepare(known(), TrainState(step=step), Alone())
        assert batch.advantages is not None and batch.returns is not None
        assert bool((batch.advantages != 0).any()) is learns and bool((batch.returns != 0).any())
    adaptive = replace(objective, target=4.0)  # a policy that does not move says nothing about its coefficient
    assert adaptive.prepare(known(), TrainState(step=1), Alone())[1].beta is None
    assert adaptive.prepare(known(), TrainState(step=2), Alone())[1].beta == pytest.approx(BETA * 0.98)


def test_the_share_of_tokens_that_the_clip_cut() -> None:
    """As in the clip's test above: advantages −3, −3, −2, 2, 2, 2, 6, 17, 17, and a ratio of e: six of nine are cut."""
    objective = Ppo(beta=0.0, **PLAIN)
    batch, _ = objective.prepare(known(ZERO + 4.0), TrainState(), Alone())
    cut, tokens = objective.diagnostics(TokenStats(logprobs=KL - 4), batch)["policy/clip_fraction"]
    assert (int(cut), int(tokens)) == (6, 9)


def test_the_coefficient_follows_the_kl() -> None:
    """KL = (3 + 2 + 1 + 4 + 2)/5 = 2.4. Target 2: 2.4/2 − 1 = .2, so 2 % more; target 4: the clip, 2 % less."""
    for target, factor in ((2.0, 1.02), (2.2, 1 + 0.1 * (2.4 / 2.2 - 1)), (4.0, 0.98)):
        objective = Ppo(beta=BETA, target=target, **PLAIN)
        first, state = objective.prepare(known(), TrainState(), Alone())
        assert first.beta == BETA and state.beta == pytest.approx(BETA * factor, rel=1e-9)
    second, state = objective.prepare(known(), state, Alone())
    assert second.beta == pytest.approx(BETA * 0.98) and state.beta == pytest.approx(BETA * 0.98**2)
    assert second.advantages is not None and first.advantages is not None
    assert not torch.equal(second.advantages, first.advantages)  # charged with the new coefficient
    assert TrainState.from_json(state.to_json()).beta == state.beta
    fixed, state = Ppo(beta=BETA, **PLAIN).prepare(known(), TrainState(), Alone())
    assert fixed.beta is None and state.beta is None


def test_a_process_has_a_prompt_for_every_minibatch() -> None:
    from rlhf.assemble.policy import _minibatches_have_prompts

    objective = Ppo(minibatches=4)
    _minibatches_have_prompts(objective, slice(4, 8))
    with pytest.raises(UserError, match="a process has 3 of the step's prompts"):
        _minibatches_have_prompts(objective, slice(0, 3))


# --- on a tiny Gemma -------------------------------------------------------------------------------------------------


def actor_critic(zero: bool = True) -> tuple[ScoredModel, FrozenReference]:
    """The policy of tests.support with a critic of its own; ``zero``: one that says 0."""
    policy, reference = policy_and_reference()
    classifier = build_reward_model(tiny_config(), seed=5)
    if zero:
        torch.nn.init.zeros_(classifier.score.weight)
    return ScoredModel(policy.causal_lm, critic=Critic(classifier)), reference


def prepared(objective: Any, policy: ScoredModel, reference: FrozenReference, values: bool) -> Rollout:
    rollout = with_reference(fixed_rollout(), reference)
    with torch.no_grad():
        found = token_stats(policy, plain_rows(rollout), Ppo().request)
    rollout = replace(rollout, old_logprobs=found.logprobs, values=found.values if values else None)
    batch, _ = objective.prepare(rollout, TrainState(), Alone())
    assert isinstance(batch, Rollout)
    return batch


def gradient(objective: Any, zero: bool = True, values: bool = True) -> Tensor:
    """Of the policy's weights, over the count."""
    policy, reference = actor_critic(zero)
    batch = prepared(objective, policy, reference, values)
    stats = token_stats(policy, plain_rows(batch), objective.request)
    loss = sum(objective.loss_sum(stats, batch).values()) / objective.count(batch)
    found = torch.autograd.grad(loss, list(policy.causal_lm.parameters()))
    return torch.cat([part.flatten() for part in found])


REINFORCE = Reinforce(beta=0.3, baseline="none", credit="to_go")


@pytest.mark.parametrize("clip", [0.0, 0.2, 0.9])
def test_ppo_reduces_to_reinforce(clip: float) -> None:
    """One epoch, one minibatch, γ = λ = 1, V = 0: the same gradient to rounding, whatever the clip."""
    expected = gradient(REINFORCE, values=False)
    found = gradient(Ppo(beta=0.3, clip=clip, **PLAIN))
    assert float((found - expected).norm() / expected.norm()) <= 1e-6


def test_the_surrogate_is_the_policy_gradient_to_the_last_bit() -> None:
    """Given the same advantages, on the same code path: not one bit differs."""
    policy, reference = actor_critic()
    batch = prepared(Ppo(beta=0.3, **PLAIN), policy, reference, values=True)
    assert batch.advantages is not None and batch.old_logprobs is not None
    found = []
    for clip in (None, 0.0, 0.2):
        logprobs = token_stats(policy, plain_rows(batch), Ppo().request).logprobs
        if clip is None:
            loss = losses.policy_gradient_sum(logprobs, batch.advantages, batch.completion_mask, batch.valid)
        else:
            loss, _ = losses.clipped_surrogate_sum(
                logprobs, batch.old_logprobs, batch.advantages, batch.completion_mask, batch.valid, clip, clip
            )
        found.append(torch.autograd.grad(loss, list(policy.causal_lm.parameters())))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("objective", "zero"),
    [
        (Ppo(beta=0.3, gamma=1.0, gae_lambda=0.5, epochs=1), True),
        (Ppo(beta=0.3, gamma=0.9, gae_lambda=1.0, epochs=1), True),
        (Ppo(beta=0.3, **PLAIN), False),
    ],
    ids=["lambda", "gamma", "values"],
)
def test_what_breaks_the_reduction(objective: Ppo, zero: bool) -> None:
    expected = gradient(REINFORCE, values=False)
    assert float((gradient(objective, zero) - expected).norm() / expected.norm()) > 1e-2


def test_the_critic_is_trained_by_its_own_loss_alone() -> None:
    policy, reference = actor_critic(zero=False)
    objective = Ppo(beta=0.3)
    batch = prepared(objective, policy, reference, values=True)
    sums = objective.loss_sum(token_stats(policy, plain_rows(batch), objective.request), batch)
    actor, critic = list(policy.causal_lm.parameters()), list(policy.critic.parameters())  # type: ignore[union-attr]
    of_policy = torch.autograd.grad(sums["policy"], critic, allow_unused=True, retain_graph=True)
    of_value = torch.autograd.grad(sums["value"], actor, allow_unused=True, retain_graph=True)
    assert all(part is None for part in (*of_policy, *of_value))
    assert any(bool((part != 0).any()) for part in torch.autograd.grad(sums["value"], critic))


def test_a_shared_critic_is_a_head_on_the_policy() -> None:
    """0 at first, so the policy's gradient is the reduction's; its own loss reaches the trunk."""
    policy, reference = policy_and_reference()
    shared = ScoredModel(policy.causal_lm, critic=ValueHead(32))
    objective = Ppo(beta=0.3, **PLAIN)
    batch = prepared(objective, shared, reference, values=True)
    assert batch.values is not None and not bool(batch.values.any())
    stats = token_stats(shared, plain_rows(batch), objective.request)
    actor = list(shared.causal_lm.parameters())
    of_policy = torch.autograd.grad(objective.loss_sum(stats, batch)["policy"], actor, retain_graph=True)
    of_both = torch.autograd.grad(sum(objective.loss_sum(stats, batch).values()), list(shared.parameters()))  # type: ignore[arg-type]
    found = torch.cat([part.flatten() for part in of_policy]) / objective.count(batch)
    expected = gradient(REINFORCE, values=False)
    assert float((found - expected).norm() / expected.norm()) <= 1e-6
    assert bool(of_both[-2].any())  # of the head's weight
    torch.nn.init.ones_(shared.critic.linear.weight)  # type: ignore[union-attr, arg-type]
    value = objective.loss_sum(token_stats(shared, plain_rows(batch), objective.request), batch)["value"]
    assert any(bool(part.any()) for part in torch.autograd.grad(value, actor))


def test_values_are_of_the_tokens_before() -> None:
    """Changing a completion's last token changes no value: V_t knows the tokens before t."""
    policy, _ = actor_critic(zero=False)
    rollout = fixed_rollout()
    changed = rollout.completion_ids.clone()
    last = rollout.completion_mask.sum(1) - 1
    changed[torch.arange(len(rollout)), last] = 7
    with torch.no_grad():
        before = token_stats(policy, plain_rows(rollout), Ppo().request)
        after = token_stats(policy, plain_rows(replace(rollout, completion_ids=changed)), Ppo().request)
    assert before.values is not None and after.values is not None
    torch.testing.assert_close(after.values, before.values, rtol=0, atol=1e-6)
    assert not torch.equal(after.logprobs, before.logprobs)


def test_a_policy_without_a_critic_is_asked_for_no_values() -> None:
    lm = ScoredModel(frozen_copy(tiny_lm()))
    with pytest.raises(AssertionError, match="without a critic"):
        token_stats(lm, plain_rows(fixed_rollout()), Ppo().request)
