"""SimPO by hand."""

from __future__ import annotations

from math import exp, log1p

import pytest
import torch

from rlhf.interfaces import TokenStats
from rlhf.objectives.simpo import Simpo
from tests.objectives.by_hand import KL
from tests.objectives.test_dpo import data_pairs

# log π of a token is KL − 5, so its means are −5 + 3/2, 2, 1/3, 4, 1: completion 0 beats 1 and 2, and 3 beats 4
LEADS = [-0.5, 3 / 2 - 1 / 3, 3.0]


def test_the_loss_by_hand() -> None:
    objective, stats = Simpo(beta=2.0, margin=0.5), TokenStats(logprobs=KL - 5)
    assert objective.compared(stats, data_pairs()).tolist() == pytest.approx([-3.5, -3, -5 + 1 / 3, -1, -4])
    assert int(objective.count(data_pairs())) == 3
    expected = sum(log1p(exp(-(2 * lead - 0.5))) for lead in LEADS)
    assert float(objective.loss_sum(stats, data_pairs())["policy"]) == pytest.approx(expected, rel=1e-6)


def test_padding_has_no_gradient() -> None:
    stats = TokenStats(logprobs=(KL - 5).requires_grad_())
    (gradient,) = torch.autograd.grad(Simpo().loss_sum(stats, data_pairs())["policy"], stats.logprobs)
    assert bool((gradient[~data_pairs().completion_mask] == 0).all()) and bool(gradient.any())
