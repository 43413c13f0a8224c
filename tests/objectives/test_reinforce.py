"""REINFORCE by hand, on the five completions of tests/objectives/by_hand.py."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

import pytest
import torch

from rlhf.interfaces import Alone, StatsRequest, TrainState
from rlhf.objectives.reinforce import Reinforce
from tests.objectives.by_hand import (
    BETA,
    KL,
    NAN,
    REWARDS,
    advantages,
    by_row,
    hand_made,
    label,
    live,
    make,
    multipliers,
    near,
    spread,
    without,
)

# --- the score part: what prepare makes of rewards -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Reinforce(beta=0.0, baseline="none"), REWARDS),
        (Reinforce(beta=0.0, baseline="batch_mean"), [-7.0, -6, -2, 2, 13]),  # (1 + 2 + 6 + 10 + 21)/5 = 8
        (Reinforce(beta=0.0, baseline="leave_one_out"), [-3.0, -1.5, 4.5, -11, 11]),  # 1 − (2 + 6)/2, …
        (Reinforce(beta=0.0, baseline="shrinkage"), [-3.0, -1.5, 4.5, -11, 11]),  # two groups: leave-one-out
    ],
    ids=label,
)
def test_advantages_by_hand(objective: Reinforce, expected: list[float]) -> None:
    assert advantages(objective, hand_made()) == expected


def test_shrinkage_with_five_groups_by_hand() -> None:
    """Five prompts with rewards −1 and 1: λ = 8/9 and the others' mean is 0, so b = ±1/9 (tests/maths)."""
    rollout = make([-1.0, 1] * 5, [row // 2 for row in range(10)], [1] * 10)
    found = advantages(Reinforce(beta=0.0, baseline="shrinkage"), rollout)
    assert found == pytest.approx([-10 / 9, 10 / 9] * 5, abs=1e-6)  # float32


def test_three_groups_are_too_few_to_shrink() -> None:
    rollout = make([1.0, 3, 0, 8, 5, 6], [0, 0, 1, 1, 2, 2], [1] * 6)
    assert advantages(Reinforce(beta=0.0, baseline="shrinkage"), rollout) == [-2, 2, -8, 8, -1, 1]


def test_the_moving_average_is_updated_after_it_was_used() -> None:
    objective = Reinforce(beta=0.0, baseline="moving_average")
    first, state = objective.prepare(hand_made(), TrainState(step=7), Alone())
    assert first.advantages is not None and first.advantages.tolist() == REWARDS  # before there is one: 0
    assert state == TrainState(step=7, moving_average=8.0)
    second, state = objective.prepare(hand_made(), state, Alone())
    assert second.advantages is not None and second.advantages.tolist() == [-7, -6, -2, 2, 13]
    assert state.moving_average == 8.0
    _, state = objective.prepare(hand_made(), TrainState(moving_average=3.0), Alone())
    assert state.moving_average == pytest.approx(0.9 * 3 + 0.1 * 8, rel=1e-12)


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "leave_one_out", "shrinkage"])
def test_other_baselines_leave_the_state_alone(baseline: Any) -> None:
    state = TrainState(step=3, moving_average=5.0)
    assert Reinforce(beta=0.0, baseline=baseline).prepare(hand_made(), state, Alone())[1] is state


def test_greedy_by_hand() -> None:
    objective = Reinforce(beta=0.0, baseline="greedy")
    assert advantages(objective, hand_made(greedy_rewards=torch.tensor([4.0, 4, 4, 15, 15]))) == [-3, -2, 2, -5, 6]
    # Prompt 1's greedy completion could not be scored: the mean of those that could
    assert advantages(objective, hand_made(greedy_rewards=torch.tensor([4.0, 4, 4, NAN, NAN]))) == [-3, -2, 2, 6, 17]
    assert advantages(objective, hand_made(greedy_rewards=torch.full((5,), NAN))) == REWARDS


def test_optimal_token_by_hand() -> None:
    """Weights of row 0's rivals: W = [2, 2] (ended, keeps its last value) and [1, 2] on rewards 2 and 6."""
    norms = torch.tensor([[1.0, 1, NAN], [2, NAN, NAN], [1, 1, 2], [1, NAN, NAN], [3, 1, NAN]])
    found = multipliers(Reinforce(beta=0.0, baseline="optimal_token"), hand_made(score_norms=norms))
    row_0 = [1 - (2 * 2 + 1 * 6) / 3, 1 - (2 * 2 + 2 * 6) / 4]
    row_2 = [6 - (1 * 1 + 2 * 2) / 3, 6 - (2 * 1 + 2 * 2) / 4, 6 - (2 * 1 + 2 * 2) / 4]
    assert found == near([row_0, [2 - (1 + 6) / 2], row_2, [-11], [11, 11]])


# --- the KL part -----------------------------------------------------------------------------------------------------


def test_sequence_credit_is_leave_one_out_of_penalized_rewards() -> None:
    """Penalized: 1 − 1.5, 2 − 1, 6 − .5, 10 − 2, 21 − 1 = −.5, 1, 5.5, 8, 20; −.5 − (1 + 5.5)/2 = −3.75, …"""
    found = multipliers(Reinforce(beta=BETA), hand_made())
    assert found == spread([-3.75, -1.5, 5.25, -12, 12])


@pytest.mark.parametrize(
    ("baseline", "state", "expected"),
    [
        ("none", None, [-0.5, 1, 5.5, 8, 20]),
        ("batch_mean", None, [-0.5 - 6.8, 1 - 6.8, 5.5 - 6.8, 8 - 6.8, 20 - 6.8]),
        ("moving_average", TrainState(moving_average=3.0), [-3.5, -2, 2.5, 5, 17]),
        ("shrinkage", None, [-3.75, -1.5, 5.25, -12, 12]),
        ("greedy", None, [-0.5 - 4, 1 - 4, 5.5 - 4, 8 - 15, 20 - 15]),  # acts on the score alone
    ],
)
def test_penalized_rewards_minus_other_baselines(
    baseline: Any, state: TrainState | None, expected: list[float]
) -> None:
    rollout = hand_made(greedy_rewards=torch.tensor([4.0, 4, 4, 15, 15]))
    assert multipliers(Reinforce(beta=BETA, baseline=baseline), rollout, state) == near(spread(expected))


def test_optimal_token_weighs_penalized_rewards() -> None:
    norms = torch.ones(5, 3)  # every rival of length 1 and more weighs 1 at the first token
    found = multipliers(Reinforce(beta=BETA, baseline="optimal_token"), hand_made(score_norms=norms))
    assert [row[0] for row in found] == near([[-3.75, -1.5, 5.25, -12, 12]])[0]
    # Second token of row 0: row 1 has ended with W = 1, row 2 has W = 2
    assert found[0][1] == pytest.approx(-0.5 - (1 * 1 + 2 * 5.5) / 3, abs=4e-6)


def test_the_moving_average_is_of_penalized_rewards() -> None:
    _, state = Reinforce(beta=BETA, baseline="moving_average").prepare(hand_made(), TrainState(), Alone())
    assert state.moving_average == pytest.approx((-0.5 + 1 + 5.5 + 8 + 20) / 5, rel=1e-6)


def test_to_go_charges_a_token_with_what_comes_after_it() -> None:
    """Row 0: −3 − ½·(3 − (2 + 1)/2), −3 − ½·(2 − (0 + 1)/2): past row 1's end its KL to go is 0."""
    found = multipliers(Reinforce(beta=BETA, credit="to_go"), hand_made())
    assert found == [[-3.75, -3.75], [-1.5], [5.25, 4.5, 4.5], [-12], [12, 10.5]]


def test_to_go_without_a_baseline_is_not_centred() -> None:
    found = multipliers(Reinforce(beta=BETA, credit="to_go", baseline="none"), hand_made())
    assert found == [[1 - 1.5, 1 - 1], [2 - 1], [6 - 0.5, 6 - 0.5, 6], [10 - 2], [21 - 1, 21 - 0.5]]


def test_to_go_baselines_act_on_scores() -> None:
    """Scores minus their mean 8; the KL part keeps its own leave-one-out."""
    found = multipliers(Reinforce(beta=BETA, credit="to_go", baseline="batch_mean"), hand_made())
    assert found == [[-7.75, -7.75], [-6], [-1.25, -2, -2], [1], [14, 12.5]]


@pytest.mark.parametrize("credit", ["sequence", "to_go"])  # not read with exact
def test_exact_kl_is_charged_ahead_and_differentiated_here(credit: Any) -> None:
    """Row 0: −3 − ½·(2 − (0 + 1)/2), then −3: nothing comes after its last token."""
    objective = Reinforce(beta=BETA, estimator="exact", credit=credit)
    assert multipliers(objective, hand_made()) == [[-3.75, -3], [-0.75], [4.5, 4.5, 4.5], [-10.5], [10.5, 11]]
    batch, stats = objective.prepare(hand_made(), TrainState(), Alone())[0], live()
    sums = objective.loss_sum(stats, batch)
    assert list(sums) == ["policy", "kl"]
    # −Σ A·log π, row by row: A above, log π = −5 + KL
    assert sums["policy"].item() == -(15 + 9) - 2.25 + 4.5 * 14 - 10.5 + 4 * 21.5
    assert sums["kl"].item() == BETA * (3 + 2 + 1 + 4 + 2)
    assert stats.kl is not None
    (gradient,) = torch.autograd.grad(sums["policy"] + sums["kl"], stats.kl)
    assert torch.equal(gradient, BETA * batch.completion_mask)  # the charge ahead is detached


def test_exact_kl_without_a_baseline_is_not_centred() -> None:
    found = multipliers(Reinforce(beta=BETA, estimator="exact", baseline="none"), hand_made())
    assert found == [[0, 1], [2], [5.5, 6, 6], [10], [20.5, 21]]


def test_exact_needs_no_logprobs_of_the_reference_beforehand() -> None:
    for baseline in ("leave_one_out", "batch_mean", "moving_average", "shrinkage"):
        bare = hand_made(ref_logprobs=None, rollout_logprobs=None)
        multipliers(Reinforce(beta=BETA, estimator="exact", baseline=baseline), bare)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k2", 0.5 * (9 + 4 + 1 + 16 + 4)),
        ("k3", 4 * exp(-1) + 2 * (exp(-2) + 1) + (exp(-4) + 3)),  # e^−δ − 1 + δ: δ is 1 four times, 2 twice, 4 once
        ("exact_local", 12.0),
    ],
)
def test_kl_in_the_loss(estimator: Any, expected: float) -> None:
    objective = Reinforce(beta=0.0, loss_beta=0.25, loss_estimator=estimator)
    sums = objective.loss_sum(live(), objective.prepare(hand_made(), TrainState(), Alone())[0])
    assert list(sums) == ["policy", "kl_loss"]
    assert sums["kl_loss"].item() == pytest.approx(0.25 * expected, rel=1e-6)  # float32


def test_kl_in_reward_and_loss_are_two_settings() -> None:
    objective = Reinforce(beta=BETA, estimator="exact", loss_beta=0.25, loss_estimator="exact_local")
    sums = objective.loss_sum(live(), objective.prepare(hand_made(), TrainState(), Alone())[0])
    assert {name: sums[name].item() for name in ("kl", "kl_loss")} == {"kl": BETA * 12, "kl_loss": 0.25 * 12}


def test_the_reference_of_the_same_forward_comes_first() -> None:
    """Its logprobs equal the policy's: no KL, whatever an earlier pass said."""
    objective = Reinforce(beta=BETA)
    batch, stats = objective.prepare(hand_made(), TrainState(), Alone())[0], live()
    stats = stats._replace(ref_logprobs=stats.logprobs.detach())
    (gradient,) = torch.autograd.grad(objective.loss_sum(stats, batch)["policy"], stats.logprobs)
    assert by_row(-gradient, batch) == spread([-3, -1.5, 4.5, -11, 11])


def test_the_trainers_own_logprobs_come_before_the_samplers() -> None:
    """Baselines over prompts: old_logprobs where there are any. At the reference there is no KL, and the mean is 8."""
    rollout = hand_made(old_logprobs=torch.full((5, 3), -5.0))
    assert advantages(Reinforce(beta=BETA, baseline="batch_mean"), rollout) == [-7, -6, -2, 2, 13]


def test_baselines_of_their_own_group_ask_nothing_of_the_sampler() -> None:
    """none, leave_one_out and greedy leave the whole KL to the live logprobs: see ``_LINEAR_IN_GROUP``."""
    bare = hand_made(rollout_logprobs=None, greedy_rewards=torch.zeros(5))
    for baseline in ("none", "greedy"):
        found = multipliers(Reinforce(beta=BETA, baseline=baseline), bare)
        assert found == spread([-0.5, 1, 5.5, 8, 20])
    assert multipliers(Reinforce(beta=BETA), bare) == spread([-3.75, -1.5, 5.25, -12, 12])


# --- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Reinforce(beta=0.0), [[-1, -1], [1], [0, 0, 0], [-11], [11, 11]]),
        (Reinforce(beta=0.0, baseline="none"), [[1, 1], [2], [0, 0, 0], [10], [21, 21]]),
        (Reinforce(beta=0.0, baseline="batch_mean"), [[-7.5, -7.5], [-6.5], [0, 0, 0], [1.5], [12.5, 12.5]]),
        (Reinforce(beta=0.0, baseline="moving_average"), [[1, 1], [2], [0, 0, 0], [10], [21, 21]]),
        (Reinforce(beta=BETA), [[-1.5, -1.5], [1.5], [0, 0, 0], [-12], [12, 12]]),  # −.5 − 1, 1 + .5
        (Reinforce(beta=BETA, credit="to_go"), [[-1.5, -2], [1.5], [0, 0, 0], [-12], [12, 10.5]]),
        (Reinforce(beta=BETA, estimator="exact"), [[-2, -1], [2], [0, 0, 0], [-10.5], [10.5, 11]]),
    ],
    ids=label,
)
def test_an_unscorable_row_leaves_baseline_and_loss(objective: Reinforce, expected: list[list[float]]) -> None:
    """Row 2 could not be scored: rows 0 and 1 are compared with each other, and the mean is 34/4."""
    broken = without(hand_made(), 2)
    assert multipliers(objective, broken) == expected
    assert int(objective.count(broken)) == 4
    batch, state = objective.prepare(broken, TrainState(), Alone())
    stats = live()._replace(logprobs=torch.where(batch.valid[:, None], KL - 5, NAN))
    assert all(bool(value.isfinite()) for value in objective.loss_sum(stats, batch).values())
    assert state.moving_average == (8.5 if objective.baseline == "moving_average" else None)


def test_a_step_without_a_scorable_row_is_nothing() -> None:
    objective = Reinforce(beta=0.0, baseline="moving_average")
    batch, state = objective.prepare(without(hand_made(), *range(5)), TrainState(moving_average=3.0), Alone())
    assert batch.advantages is not None and batch.advantages.tolist() == [0] * 5
    assert state.moving_average == 3.0 and int(objective.count(batch)) == 0


def test_equal_rewards_without_kl_have_no_gradient() -> None:
    rollout = replace(hand_made(), rewards=torch.full((5,), 3.7))
    for baseline in ("leave_one_out", "batch_mean", "shrinkage"):
        found = multipliers(Reinforce(beta=0.0, baseline=baseline), rollout)
        assert found == near(spread([0] * 5)), baseline
    assert multipliers(Reinforce(beta=0.0), rollout) == spread([0] * 5)  # to the last bit


@pytest.mark.parametrize(
    "objective",
    [Reinforce(beta=BETA), Reinforce(beta=BETA, credit="to_go"), Reinforce(beta=BETA, estimator="exact")],
    ids=["sequence", "to_go", "exact"],
)
def test_a_constant_added_to_rewards_changes_nothing_under_leave_one_out(objective: Reinforce) -> None:
    """1024 and quarters: exact in float32, so the gradients agree to the last bit."""
    moved = replace(hand_made(), rewards=torch.tensor(REWARDS) + 1024)
    assert multipliers(objective, moved) == multipliers(objective, hand_made())


# --- what it asks for, and what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (Reinforce(), {"scores", "reference"}),
        (Reinforce(beta=0.0), {"scores", "reference"}),  # kl/reference is measured all the same
        (Reinforce(credit="to_go"), {"scores", "reference"}),
        (Reinforce(baseline="greedy"), {"scores", "reference", "greedy"}),
        (Reinforce(baseline="optimal_token"), {"scores", "reference", "score_norms"}),
        (Reinforce(loss_beta=0.1), {"scores", "reference"}),
        (Reinforce(loss_beta=0.1, loss_estimator="exact_local"), {"scores", "reference_distribution"}),
        (Reinforce(estimator="exact"), {"scores", "reference_distribution"}),
        (Reinforce(estimator="exact", baseline="greedy"), {"scores", "reference_distribution", "greedy"}),
    ],
)
def test_needs(objective: Reinforce, needs: set[str]) -> None:
    assert objective.needs == needs and objective.unit == "group"


def test_the_reference_runs_beside_the_policy_only_for_exact_kl() -> None:
    assert Reinforce(temperature=0.7).request == StatsRequest(temperature=0.7, entropy=True, reference=False)
    assert Reinforce(estimator="exact").request == StatsRequest(entropy=True, reference=True)
    assert Reinforce(loss_beta=0.1, loss_estimator="exact_local").request.reference
    assert not Reinforce(loss_beta=0.1, loss_estimator="k3").request.reference
    assert not Reinforce(loss_beta=0.0, loss_estimator="exact_local").request.reference


@pytest.mark.parametrize(
    ("objective", "missing", "message"),
    [
        (Reinforce(), "rewards", "score the rollout"),
        (Reinforce(baseline="greedy"), "greedy_rewards", "needs greedy_rewards"),
        (Reinforce(baseline="optimal_token"), "score_norms", "needs score_norms"),
        (Reinforce(baseline="batch_mean"), "ref_logprobs", "needs logprobs of sampler and reference"),
        (Reinforce(baseline="moving_average"), "rollout_logprobs", "needs logprobs of sampler and reference"),
        (Reinforce(baseline="value"), "values", "not available"),
    ],
)
def test_what_is_missing_is_named(objective: Reinforce, missing: str, message: str) -> None:
    complete = hand_made(greedy_rewards=torch.ones(5), score_norms=torch.ones(5, 3))
    with pytest.raises(ValueError, match=message):
        nothing: dict[str, Any] = {missing: None}
        objective.prepare(replace(complete, **nothing), TrainState(), Alone())


def test_a_penalty_without_reference_is_refused_and_none_is_not() -> None:
    bare = hand_made(ref_logprobs=None)
    with pytest.raises(ValueError, match="needs the reference's logprobs"):
        multipliers(Reinforce(beta=BETA), bare)
    assert multipliers(Reinforce(beta=0.0), bare) == spread([-3, -1.5, 4.5, -11, 11])


@pytest.mark.parametrize("baseline", ["moving_average", "batch_mean", "shrinkage", "optimal_token"])
def test_exact_local_beside_k1_needs_both_forms_of_the_reference(baseline: Any) -> None:
    """``prepare`` penalizes rewards for these baselines by logprobs; the loss-side KL wants the distribution."""
    objective = Reinforce(beta=0.1, baseline=baseline, loss_beta=0.1, loss_estimator="exact_local")
    assert {"reference", "reference_distribution"} <= objective.needs
