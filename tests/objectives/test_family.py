"""The REINFORCE family by hand, on the five completions of tests/objectives/by_hand.py; and several passes."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from typing import Any

import pytest
import torch

from rlhf.interfaces import Alone, Passes, TrainState
from rlhf.maths import baselines
from rlhf.objectives.raft import Raft
from rlhf.objectives.reinforce import Reinforce
from rlhf.programs import passes
from rlhf.runtime.updater import UpdateReport
from tests.objectives.by_hand import (
    BETA,
    GROUP,
    KL,
    LENGTHS,
    REWARDS,
    advantages,
    by_row,
    hand_made,
    live,
    multipliers,
    near,
    spread,
    without,
)

GROUP_STD = sqrt(14 / 3)  # of 1, 2, 6: their mean is 3
BATCH_STD = sqrt(74.5 / 4)  # of −2, −1, 3, −5.5, 5.5


def test_group_mean_by_hand() -> None:
    assert advantages(Reinforce(beta=0.0, baseline="group_mean"), hand_made()) == [-2, -1, 3, -5.5, 5.5]
    found = multipliers(Reinforce(beta=BETA, baseline="group_mean"), hand_made())  # of −.5, 1, 5.5 and 8, 20
    assert found == near(spread([-2.5, -1, 3.5, -6, 6]))


def test_division_by_the_groups_spread() -> None:
    objective = Reinforce(beta=0.0, baseline="group_mean", divide_by="group_std")
    found = multipliers(objective, hand_made())
    assert found == near(spread([-2 / GROUP_STD, -1 / GROUP_STD, 3 / GROUP_STD, -1, 1]))
    rewards, group = torch.tensor(REWARDS), torch.tensor(GROUP)
    whole = baselines.group_standardised(rewards, group, torch.ones(5, dtype=torch.bool))
    assert [row[0] for row in found] == pytest.approx(whole.tolist(), abs=4e-6)


def test_a_kl_of_whole_completions_is_divided_too() -> None:
    """Penalized: −.5, 1, 5.5 around 2 with spread √6.5, and 8, 20 around 14 with spread 6."""
    objective = Reinforce(beta=BETA, baseline="group_mean", divide_by="group_std")
    assert multipliers(objective, hand_made()) == near(
        spread([-2.5 / sqrt(6.5), -1 / sqrt(6.5), 3.5 / sqrt(6.5), -1, 1])
    )
    # Leave-one-out splits into score and KL elsewhere; here its KL part must not be subtracted twice.
    others = Reinforce(beta=BETA, baseline="leave_one_out", divide_by="group_std")
    assert multipliers(others, hand_made()) == near(
        spread([-3.75 / sqrt(6.5), -1.5 / sqrt(6.5), 5.25 / sqrt(6.5), -2, 2])
    )


def test_a_kl_by_position_is_not_divided() -> None:
    plain = multipliers(Reinforce(beta=BETA, baseline="group_mean", credit="to_go"), hand_made())
    scaled = multipliers(
        Reinforce(beta=BETA, baseline="group_mean", credit="to_go", divide_by="group_std"), hand_made()
    )
    scores, divided = [-2.0, -1, 3, -5.5, 5.5], [-2 / GROUP_STD, -1 / GROUP_STD, 3 / GROUP_STD, -1, 1]
    for row in range(5):
        charged = [a - scores[row] for a in plain[row]]
        assert [a - divided[row] for a in scaled[row]] == pytest.approx(charged, abs=4e-6)


def test_division_by_the_batchs_spread() -> None:
    objective = Reinforce(beta=0.0, baseline="group_mean", divide_by="batch_std")
    expected = [a / BATCH_STD for a in (-2, -1, 3, -5.5, 5.5)]
    assert multipliers(objective, hand_made()) == near(spread(expected))


def test_rows_without_a_score_divide_nothing() -> None:
    """Without the 6: 1, 2 around 1.5 with spread .5."""
    objective = Reinforce(beta=0.0, baseline="group_mean", divide_by="group_std")
    assert multipliers(objective, without(hand_made(), 2)) == near(spread([-1, 1, 0, -1, 1]))


@pytest.mark.parametrize("average", ["completions", "tokens", "completion_tokens"])
def test_what_the_loss_is_a_mean_over(average: Any) -> None:
    objective = Reinforce(beta=0.0, baseline="group_mean", average=average)
    lengths = LENGTHS if average == "completion_tokens" else [1] * 5
    expected = [a / length for a, length in zip((-2, -1, 3, -5.5, 5.5), lengths, strict=True)]
    assert multipliers(objective, hand_made()) == near(spread(expected))
    assert int(objective.count(hand_made())) == (sum(LENGTHS) if average == "tokens" else 5)


@pytest.mark.parametrize(("estimator", "expected"), [("k3", None), ("exact_local", [3 / 2, 2.0, 1 / 3, 4, 1])])
def test_a_kl_in_the_loss_is_averaged_with_the_rest(estimator: Any, expected: list[float] | None) -> None:
    objective = Reinforce(beta=0.0, loss_beta=1.0, loss_estimator=estimator, average="completion_tokens")
    batch, _ = objective.prepare(hand_made(), TrainState(), Alone())
    found = float(objective.loss_sum(live(), batch)["kl_loss"].detach())
    if expected is None:  # k3 = e^(−δ) + δ − 1 token by token
        k3 = torch.expm1(-KL) + KL
        expected = [float(k3[row].sum()) / LENGTHS[row] for row in range(5)]
    assert found == pytest.approx(sum(expected), rel=1e-6)


# --- several updates of one rollout ----------------------------------------------------------------------------------


def test_completions_are_weighted_by_their_ratio() -> None:
    """π/π_old of whole completions: 2, 1/4, 1, 8 (cut at 5), 1."""
    ratios = [2.0, 0.25, 1, 8, 1]
    old = (KL - 5).clone()
    old[:, 0] -= torch.tensor([log(ratio) for ratio in ratios])
    objective = Reinforce(beta=0.0, baseline="group_mean", updates_per_rollout=2)
    assert "old_logprobs" in objective.needs and objective.passes == Passes(epochs=2)
    found = multipliers(objective, hand_made(old_logprobs=old))
    weights = [2.0, 0.25, 1, 5, 1]
    assert found == near(spread([a * w for a, w in zip((-2, -1, 3, -5.5, 5.5), weights, strict=True)]))


def test_completions_beyond_the_cap_can_be_left_out() -> None:
    """The ratios above with a cap of 1.5: 2 and 8 weigh nothing, and are two of five."""
    old = (KL - 5).clone()
    old[:, 0] -= torch.tensor([log(ratio) for ratio in (2.0, 0.25, 1, 8, 1)])
    objective = Reinforce(beta=0.0, baseline="group_mean", updates_per_rollout=2, importance="mask", importance_cap=1.5)
    batch = hand_made(old_logprobs=old)
    assert multipliers(objective, batch) == near(spread([0.0, -0.25, 3, 0, 5.5]))
    cut, rows = objective.diagnostics(live(), batch)["policy/importance_cut_rate"]
    assert (int(cut), int(rows)) == (2, 5)


def test_how_far_the_updates_have_gone() -> None:
    """ρ = 2 on the two tokens of row 0, 1 elsewhere: 2·(2 − 1 − log 2) over 5 completions; 0 for the same policy."""
    rollout = hand_made(old_logprobs=KL - 5)
    assert passes.drift(rollout, KL - 5, Alone()) == 0
    moved = KL - 5
    moved[0] += log(2)
    assert passes.drift(rollout, moved, Alone()) == pytest.approx(2 * (1 - log(2)) / 5, rel=1e-6)


def test_the_first_update_is_that_of_a_single_one() -> None:
    once, twice = Reinforce(beta=BETA), Reinforce(beta=BETA, updates_per_rollout=2)
    assert multipliers(once, hand_made()) == multipliers(twice, hand_made(old_logprobs=KL - 5))


def test_completions_of_an_older_policy_are_weighted_in_their_only_update() -> None:
    ratios = [2.0, 0.25, 1, 8, 1]
    old = (KL - 5).clone()
    old[:, 0] -= torch.tensor([log(ratio) for ratio in ratios])
    objective = Reinforce(beta=0.0, baseline="group_mean", stale=True)
    assert "old_logprobs" in objective.needs and objective.passes == Passes()
    again = Reinforce(beta=0.0, baseline="group_mean", updates_per_rollout=2)
    assert multipliers(objective, hand_made(old_logprobs=old)) == multipliers(again, hand_made(old_logprobs=old))


def test_every_row_is_in_one_minibatch_of_an_epoch_with_its_group() -> None:
    rollout = hand_made()
    found = [part for e in range(3) for part in passes.parts(rollout, Passes(epochs=3, minibatches=2), 7, 4, e)]
    assert [sorted(set(part.group.tolist())) for part in found[:2]] in ([[0], [1]], [[1], [0]])
    for epoch in (found[0:2], found[2:4], found[4:6]):
        assert sorted(reward for part in epoch for reward in part.rewards.tolist()) == REWARDS  # type: ignore[union-attr]
    assert next(passes.parts(rollout, Passes(), seed=7, step=4, epoch=0)) is rollout


def test_a_skipped_step_among_measured_ones() -> None:
    """One of two steps was skipped, so nothing was measured of it: means are of the other."""
    report = UpdateReport(losses={"policy": 1.0}, grad_norm=2.0, lr=0.1, applied=True, microbatches=1, stats=(live(),))
    measured = replace(report, measured={"optim/step_kl": 0.5})
    rollout = hand_made(old_logprobs=KL - 5)
    for pair in ([measured, report], [report, measured]):
        updates = [passes.Update(rollout, each) for each in pair]
        found = passes.metrics(updates, Reinforce(updates_per_rollout=2), None, Alone())
        assert found["optim/step_kl"] == 0.5


def test_the_share_of_completions_that_still_count() -> None:
    """w = 1, 1, 2, 4 and a row that is not valid: 8²/(4·22)."""
    rollout = without(hand_made(old_logprobs=torch.zeros(5, 3)), 4)
    logprobs = torch.zeros(5, 3)
    logprobs[:, 0] = torch.tensor([0, 0, log(2), log(4), 50.0])
    stats = live()._replace(logprobs=logprobs)
    report = UpdateReport(losses={"policy": 1.0}, grad_norm=2.0, lr=0.1, applied=True, microbatches=1, stats=(stats,))
    late = replace(report, losses={"policy": 3.0}, lr=0.2)
    updates = [passes.Update(rollout, report), passes.Update(rollout, late)]
    found = passes.metrics(updates, Reinforce(updates_per_rollout=2), None, Alone())
    assert found["policy/importance_cut_rate"] == 0 and found["optim/updates"] == 2
    assert found["policy/effective_sample_share"] == pytest.approx(64 / 88, rel=1e-6)
    assert (found["policy/loss"], found["optim/lr"]) == (2.0, 0.2)
    once = [passes.Update(replace(rollout, old_logprobs=None), report)]  # one update, by the policy that sampled
    assert "policy/effective_sample_share" not in passes.metrics(once, Reinforce(), None, Alone())


# --- RAFT ------------------------------------------------------------------------------------------------------------


def test_raft_imitates_the_best_by_penalized_reward() -> None:
    rollout = hand_made(rollout_logprobs=torch.full((5, 3), -5.0) + KL)
    objective = Raft(beta=0.0)
    batch, _ = objective.prepare(rollout, TrainState(), Alone())
    assert batch.advantages is not None and batch.advantages.tolist() == [0, 0, 1, 0, 1]
    assert int(objective.count(batch)) == 2
    stats = live()
    (gradient,) = torch.autograd.grad(objective.loss_sum(stats, batch)["policy"], stats.logprobs)
    assert by_row(-gradient, batch) == spread([0, 0, 1, 0, 1])


def test_raft_charges_the_kl_and_passes_over_rows_without_a_score() -> None:
    dear, _ = Raft(beta=5.0).prepare(hand_made(), TrainState(), Alone())  # 21 − 5·2 = 11 and 10 − 5·4 = −10
    assert dear.advantages is not None and dear.advantages.tolist() == [0, 0, 1, 0, 1]
    unscored, _ = Raft(beta=0.0).prepare(without(hand_made(), 2, 3, 4), TrainState(), Alone())
    assert unscored.advantages is not None and unscored.advantages.tolist() == [0, 1, 0, 0, 0]
    assert int(Raft().count(unscored)) == 1
