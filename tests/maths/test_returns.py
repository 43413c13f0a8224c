from __future__ import annotations

import pytest
import torch

from rlhf.maths import returns

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 2.0, 4.0], [3.0, NAN, NAN]], dtype=torch.float64)
VALUES = torch.tensor([[0.5, 1.0, 2.0], [1.0, NAN, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_reward_to_go_by_hand() -> None:
    assert returns.reward_to_go(REWARDS, MASK).tolist() == [[7, 6, 4], [3, 0, 0]]
    assert returns.reward_to_go(REWARDS, MASK, 0.5).tolist() == [[1 + 1 + 1, 2 + 2, 4], [3, 0, 0]]
    almost = returns.reward_to_go(REWARDS, MASK, 1 - 1e-12)
    torch.testing.assert_close(almost, returns.reward_to_go(REWARDS, MASK))


def test_gae_by_hand() -> None:
    """γ = .5, λ = .5: δ = 1 + .5 − .5, 2 + 1 − 1, 4 − 2 = 1, 2, 2; A = 1 + .25·2.5, 2 + .25·2, 2."""
    advantages, targets = returns.gae(REWARDS, VALUES, MASK, 0.5, 0.5)
    assert advantages.tolist() == [[1.625, 2.5, 2], [2, 0, 0]]
    assert targets.tolist() == [[2.125, 3.5, 4], [3, 0, 0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_return_minus_value(gamma: float) -> None:
    advantages, targets = returns.gae(REWARDS, VALUES, MASK, gamma, 1.0)
    monte_carlo = returns.reward_to_go(REWARDS, MASK, gamma)
    torch.testing.assert_close(targets, monte_carlo)
    torch.testing.assert_close(advantages[MASK], (monte_carlo - VALUES)[MASK])


def test_lambda_zero_is_one_step() -> None:
    advantages, _ = returns.gae(REWARDS, VALUES, MASK, 1.0, 0.0)
    assert advantages.tolist() == [[1 + 1 - 0.5, 2 + 2 - 1, 4 - 2], [2, 0, 0]]


def test_tokens_that_do_not_count_take_no_time() -> None:
    """A masked token in the middle (a tool's answer, say) is skipped: no reward, no value, no discount."""
    dense = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    holes, mask = torch.tensor([[1.0, NAN, 2.0]], dtype=torch.float64), torch.tensor([[True, False, True]])
    full = torch.ones(1, 2, dtype=torch.bool)
    assert returns.reward_to_go(holes, mask, 0.5)[mask].tolist() == returns.reward_to_go(dense, full, 0.5)[0].tolist()
    sparse, _ = returns.gae(holes, 3 * holes, mask, 0.5, 0.5)
    compact, _ = returns.gae(dense, 3 * dense, full, 0.5, 0.5)
    assert sparse[mask].tolist() == compact[0].tolist() and sparse[0, 1] == 0


def test_detached() -> None:
    advantages, targets = returns.gae(REWARDS, VALUES.clone().requires_grad_(), MASK, 1.0, 0.95)
    assert not advantages.requires_grad and not targets.requires_grad
