"""Likelihood of given completions and Bradley–Terry, as sums that a reader can add up."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.objectives.supervised import BradleyTerry, DemonstrationBatch, Demonstrations, PairBatch
from rlhf.runtime.microbatches import split

NAN = float("nan")


def demonstrations() -> DemonstrationBatch:
    """Completions of 2, 1 and 3 tokens; the last row does not count."""
    batch = DemonstrationBatch.of([([2], ids, [True] * len(ids)) for ids in ([5, 1], [1], [5, 5, 1])])
    return replace(batch, valid=torch.tensor([True, True, False]))


def token_stats() -> TokenStats:
    """1.5 + 0.5 + 4 nats; what does not count is NaN."""
    return TokenStats(logprobs=torch.tensor([[-1.5, -0.5, NAN], [-4, NAN, NAN], [NAN, NAN, NAN]]).requires_grad_())


@pytest.mark.parametrize(("per", "count"), [("token", 3), ("completion", 2)])
def test_demonstrations_by_hand(per: str, count: int) -> None:
    """The sum is the same; what it is a mean over is not."""
    objective, stats = Demonstrations(per=per), token_stats()  # type: ignore[arg-type]
    assert int(objective.count(demonstrations())) == count
    sums = objective.loss_sum(stats, demonstrations())
    assert {name: value.item() for name, value in sums.items()} == {"sft": 6.0}
    (gradient,) = torch.autograd.grad(sums["sft"], stats.logprobs)
    assert gradient.tolist() == [[-1, -1, 0], [-1, 0, 0], [0, 0, 0]]


def test_the_instruction_term_has_a_name_of_its_own_and_no_temperature() -> None:
    objective = Demonstrations(name="instruction", per="completion")
    assert list(objective.loss_sum(token_stats(), demonstrations())) == ["instruction"]
    assert objective.request == StatsRequest(temperature=1.0) and objective.needs == frozenset()


def pairs(margin: tuple[float, ...] = (0, 0, 1), valid: tuple[bool, ...] = (True, True, True)) -> PairBatch:
    """Three pairs; in the second the rejected row comes first."""
    batch = PairBatch.from_ids(
        [[2]] * 6,
        [[5, 1], [1], [1], [5, 5, 1], [5, 1], [1]],
        group=[0, 0, 1, 1, 2, 2],
        member=torch.tensor([0, 1, 0, 1, 0, 1]),
        beats=(((1, margin[0]),), (), (), ((0, margin[1]),), ((1, margin[2]),), ()),
    )
    return replace(batch, valid=torch.tensor(valid).repeat_interleave(2))


def scores() -> Tensor:
    """Chosen minus rejected: 0, log 3 and 1."""
    return torch.tensor([7.0, 7, -1, log(3) - 1, 5, 4], dtype=torch.float64).requires_grad_()


def scored(values: Tensor) -> TokenStats:
    return TokenStats(logprobs=torch.zeros(0), scores=values)


def test_bradley_terry_by_hand() -> None:
    """−log σ: log 2 for equal scores, log(4/3) for odds of 3 to 1, and log 2 where the lead is just the margin."""
    objective, values = BradleyTerry(), scores()
    assert int(objective.count(pairs())) == 3
    sums = objective.loss_sum(scored(values), pairs())
    assert list(sums) == ["reward"]
    assert sums["reward"].item() == pytest.approx(log(2) + log(4 / 3) + log(2), rel=1e-12)
    (gradient,) = torch.autograd.grad(sums["reward"], values)
    # ∓(1 − σ): ½, ¼ and ½; up for the rejected, down for the chosen
    assert gradient.tolist() == pytest.approx([-0.5, 0.5, 0.25, -0.25, -0.5, 0.5], rel=1e-12)


def test_without_margin_a_lead_of_one_costs_less() -> None:
    found = BradleyTerry().loss_sum(scored(scores()), pairs(margin=(0, 0, 0)))["reward"].item()
    assert found == pytest.approx(log(2) + log(4 / 3) + log(1 + exp(-1)), rel=1e-12)


def test_a_pair_that_does_not_count() -> None:
    """Its scores may be anything, and it has no gradient."""
    objective, batch = BradleyTerry(), pairs(valid=(False, True, True))
    values = torch.tensor([NAN, NAN, *scores().tolist()[2:]], dtype=torch.float64).requires_grad_()
    assert int(objective.count(batch)) == 2
    total = objective.loss_sum(scored(values), batch)["reward"]
    assert total.item() == pytest.approx(log(4 / 3) + log(2), rel=1e-12)
    (gradient,) = torch.autograd.grad(total, values)
    assert gradient[:2].tolist() == [0, 0]


def test_pairs_stay_together_in_microbatches() -> None:
    """One pair a forward, in another order: the same total, so every chosen row still meets its own rival."""
    objective, values = BradleyTerry(), scores().detach()
    cuts = split(pairs(), budget_tokens=1)
    found = [objective.loss_sum(scored(values[cut.rows]), cut.batch)["reward"].item() for cut in cuts]
    assert len(cuts) == 3 and sum(int(objective.count(cut.batch)) for cut in cuts) == 3
    assert sum(found) == pytest.approx(2 * log(2) + log(4 / 3), rel=1e-12)


def test_what_they_ask_for() -> None:
    assert BradleyTerry().unit == "pair" and BradleyTerry().needs == {"pairs"}
    assert Demonstrations().unit == "completion" and not Demonstrations().request.reference


def test_a_completion_in_several_pairs_is_one_row() -> None:
    """Three completions ranked 0 over 1 over 2, all three pairs: leads 1, 3 and 2."""
    batch = PairBatch.from_ids(
        [[2]] * 3,
        [[5], [6], [7]],
        group=[4, 4, 4],
        member=torch.arange(3),
        beats=(((1, 0.0), (2, 0.0)), ((2, 0.0),), ()),
    )
    values = torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)
    assert int(BradleyTerry().count(batch)) == 3
    found = BradleyTerry().loss_sum(scored(values), batch)["reward"].item()
    assert found == pytest.approx(sum(log(1 + exp(-lead)) for lead in (1, 3, 2)), rel=1e-12)
