"""DPO by hand: pairs of the data and of a rollout, their labels, margins and losses."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log1p
from typing import Any

import pytest
import torch

from rlhf.interfaces import Alone, TokenStats, TrainState
from rlhf.maths import losses
from rlhf.objectives.dpo import Dpo, Labelled, ReferencedPairs
from tests.objectives.by_hand import REWARDS, hand_made, live, without

# log π/π_ref of the five completions is KL.sum(1): 3, 2, 1, 4, 2


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def as_lists(pairs: Labelled) -> list[tuple[int, int]]:
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))


def data_pairs() -> ReferencedPairs:
    """Prompt 0: completion 0 beats 1 and 2; prompt 1: completion 3 beats 4. The reference gives −5 nats a token."""
    rollout = hand_made()
    return ReferencedPairs(
        **{
            name: getattr(rollout, name)
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "group", "valid")
        },
        member=torch.tensor([0, 1, 2, 0, 1]),
        beats=(((1, 0.0), (2, 0.0)), (), (), ((1, 0.0),), ()),
        ref_logprobs=torch.full((5, 3), -5.0),
    )


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [-1.5, 0.0, 2.0])
@pytest.mark.parametrize("p", [0.6, 1.0])
def test_losses_by_hand(margin: float, p: float) -> None:
    beta, given = 0.5, torch.tensor([margin], dtype=torch.float64)
    right, wrong = log1p(exp(-beta * margin)), log1p(exp(beta * margin))
    assert float(losses.dpo_sum(given, p, beta)) == pytest.approx(p * right + (1 - p) * wrong, rel=1e-12)
    ipo = p * (margin - 1) ** 2 + (1 - p) * (margin + 1) ** 2
    assert float(losses.dpo_sum(given, p, beta, "ipo")) == pytest.approx(ipo, rel=1e-12)
    robust = (p * right - (1 - p) * wrong) / (2 * p - 1)
    assert float(losses.dpo_sum(given, p, beta, "robust")) == pytest.approx(robust, rel=1e-12)


def test_the_robust_loss_undoes_flipped_labels() -> None:
    """Mean over labels that are flipped with probability .3 = the loss of the true label."""
    margin, p = torch.tensor([1.3], dtype=torch.float64), 0.7
    noisy = p * losses.dpo_sum(margin, p, 0.5, "robust") + (1 - p) * losses.dpo_sum(-margin, p, 0.5, "robust")
    assert float(noisy) == pytest.approx(float(losses.dpo_sum(margin, 1.0, 0.5)), rel=1e-12)
    with pytest.raises(ValueError, match="more often than not"):
        losses.dpo_sum(margin, 0.5, 0.5, "robust")


def test_a_soft_label_has_its_minimum_where_the_margin_says_the_same() -> None:
    """−p·log σ(h) − (1 − p)·log σ(−h) is smallest at σ(h) = p: h = the difference of rewards."""
    difference, beta = 1.7, 0.4
    margin = torch.tensor([difference / beta], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.dpo_sum(margin, sigmoid(difference), beta), margin)
    assert float(gradient) == pytest.approx(0, abs=1e-15)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_of_the_data() -> None:
    objective = Dpo(beta=0.5, smoothing=0.1)
    batch = data_pairs()
    pairs = objective.pairs(batch)
    assert as_lists(pairs) == [(0, 1), (0, 2), (3, 4)]
    assert pairs.label.tolist() == pytest.approx([0.9] * 3)
    assert int(objective.count(batch)) == 3
    assert objective.compared(live(), batch).tolist() == [3, 2, 1, 4, 2]
    expected = sum(0.9 * log1p(exp(-0.5 * m)) + 0.1 * log1p(exp(0.5 * m)) for m in (1, 2, 2))
    assert float(objective.loss_sum(live(), batch)["policy"].detach()) == pytest.approx(expected, rel=1e-6)


def test_every_two_completions_of_a_prompt_are_a_soft_pair() -> None:
    objective = Dpo()
    pairs = objective.pairs(hand_made())
    assert as_lists(pairs) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    expected = [sigmoid(REWARDS[a] - REWARDS[b]) for a, b in as_lists(pairs)]
    assert pairs.label.tolist() == pytest.approx(expected, abs=1e-6)
    assert int(objective.count(hand_made())) == 4


def test_hard_pairs_are_the_extremes() -> None:
    pairs = Dpo(labels="hard").pairs(hand_made())
    assert as_lists(pairs) == [(2, 0), (4, 3)]
    assert pairs.label.tolist() == [1, 1]
    assert as_lists(Dpo(labels="hard").pairs(without(hand_made(), 1, 2))) == [(4, 3)]  # one completion is no pair
    equal = replace(hand_made(), rewards=torch.tensor([1.0, 1, 1, 10, 21]))
    assert as_lists(Dpo(labels="hard").pairs(equal)) == [(4, 3)]


def test_rows_without_a_score_are_in_no_pair() -> None:
    assert as_lists(Dpo().pairs(without(hand_made(), 0, 3))) == [(1, 2)]
    assert int(Dpo().count(without(hand_made(), 1, 2, 3))) == 0
    batch, _ = Dpo().prepare(without(hand_made(), 1, 2, 3), TrainState(), Alone())
    assert float(Dpo().loss_sum(live(), batch)["policy"].detach()) == 0


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_nothing_outside_the_pairs_has_a_gradient(loss: Any) -> None:
    batch, _ = Dpo(loss=loss).prepare(without(hand_made(), 0), TrainState(), Alone())
    stats = live()
    (gradient,) = torch.autograd.grad(Dpo(loss=loss).loss_sum(stats, batch)["policy"], stats.logprobs)
    assert bool((gradient[~batch.completion_mask] == 0).all()) and bool((gradient[0] == 0).all())
    assert bool((gradient[1:][batch.completion_mask[1:]] != 0).all())


def test_at_the_optimum_of_reinforce_soft_pairs_have_no_gradient() -> None:
    """log π/π_ref = r/β + a constant of the prompt: every margin is what its label says."""
    beta = 2.0
    rollout = hand_made()
    ratio = torch.tensor(REWARDS, dtype=torch.float64) / beta
    assert rollout.ref_logprobs is not None
    logprobs = rollout.ref_logprobs.double().clone()
    logprobs[:, 0] += ratio + torch.tensor([0.3, 0.3, 0.3, -7, -7])
    logprobs.requires_grad_()
    objective = Dpo(beta=beta)
    batch, _ = objective.prepare(rollout, TrainState(), Alone())
    (gradient,) = torch.autograd.grad(objective.loss_sum(TokenStats(logprobs=logprobs), batch)["policy"], logprobs)
    assert float(gradient.abs().max()) < 1e-6  # labels are float32
