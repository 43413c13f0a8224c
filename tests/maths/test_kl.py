from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.maths import kl

NAN = float("nan")
# Two groups in mixed order; the last row is alone. Lengths 3, 2, 1, 2.
KL = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, NAN], [5.0, NAN, NAN], [7.0, 9.0, NAN]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
GROUP = torch.tensor([4, 4, 4, 0])
ALL = torch.ones(4, dtype=torch.bool)


def charge(credit: kl.Credit, centre: bool, valid: Tensor = ALL) -> list[list[float]]:
    found: list[list[float]] = kl.kl_penalty_advantage(KL, MASK, GROUP, valid, credit=credit, centre=centre).tolist()
    return found


def test_estimators_have_the_sign_of_policy_minus_reference() -> None:
    policy, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
    assert kl.k1(policy, reference).tolist() == [1, -1]
    assert kl.k2(policy, reference).tolist() == [0.5, 0.5]
    assert kl.k3(policy, reference).tolist() == pytest.approx([math.exp(-1), math.e - 2])


def test_k3_is_never_negative_and_keeps_small_values() -> None:
    """δ = 1e-4 gives 5e-9, which e^−δ − 1 + δ in float32 loses entirely."""
    assert kl.k3(torch.tensor(1e-4), torch.tensor(0.0)).item() == pytest.approx(5e-9, rel=0.01)


def test_exact_kl_by_hand() -> None:
    policy = torch.log(torch.tensor([0.5, 0.5, 0.0]))
    reference = torch.log(torch.tensor([0.25, 0.25, 0.5]))
    assert kl.exact_kl(policy, reference).item() == pytest.approx(math.log(2))
    assert kl.exact_kl(policy, policy).item() == 0
    assert kl.exact_kl(reference, policy).item() == math.inf  # the reference forbids what the policy does


def test_exact_kl_gradient_is_finite_where_tokens_are_forbidden() -> None:
    """∇KL by logits = π·(log π/π_ref − KL): 0 here for the forbidden token, as for its probability."""
    logits = torch.tensor([1.0, 0.0, -torch.inf], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.0, -torch.inf]), 0)
    value = kl.exact_kl(torch.log_softmax(logits, 0), reference)
    (gradient,) = torch.autograd.grad(value, logits)
    probs = torch.softmax(logits.detach(), 0)[:2]
    by_hand = probs * (torch.log(probs / 0.5) - value.detach())
    assert gradient.tolist() == pytest.approx([*by_hand.tolist(), 0])


def test_kl_to_go_by_hand() -> None:
    assert kl.kl_to_go(KL, MASK, inclusive=True).tolist() == [[6, 5, 3], [30, 20, 0], [5, 0, 0], [16, 9, 0]]
    assert kl.kl_to_go(KL, MASK, inclusive=False).tolist() == [[5, 3, 0], [20, 0, 0], [0, 0, 0], [9, 0, 0]]


def test_sequence_credit_by_hand() -> None:
    assert charge("sequence", False) == [[6, 6, 6], [30, 30, 0], [5, 0, 0], [16, 16, 0]]
    # 6 − (30 + 5)/2, 30 − (6 + 5)/2, 5 − (6 + 30)/2; alone: not centred
    assert charge("sequence", True) == [[-11.5, -11.5, -11.5], [24.5, 24.5, 0], [-13, 0, 0], [16, 16, 0]]


def test_to_go_credit_by_hand() -> None:
    assert charge("to_go", False) == [[6, 5, 3], [30, 20, 0], [5, 0, 0], [16, 9, 0]]
    # Past a row's end its KL to go is 0 and still counts: 5 − (20 + 0)/2, 3 − (0 + 0)/2
    assert charge("to_go", True) == [[-11.5, -5, 3], [24.5, 17.5, 0], [-13, 0, 0], [16, 9, 0]]


def test_future_credit_by_hand() -> None:
    assert charge("future", False) == [[5, 3, 0], [20, 0, 0], [0, 0, 0], [9, 0, 0]]
    assert charge("future", True) == [[-5, 3, 0], [17.5, -1.5, 0], [-12.5, 0, 0], [9, 0, 0]]


@pytest.mark.parametrize("credit", ["sequence", "to_go", "future"])
def test_rows_that_do_not_count_charge_nobody(credit: kl.Credit) -> None:
    """Without row 1, row 0 and row 2 are compared with each other only."""
    valid = torch.tensor([True, False, True, True])
    keep = torch.tensor([0, 2, 3])
    whole = kl.kl_penalty_advantage(KL, MASK, GROUP, valid, credit=credit, centre=True)
    without = kl.kl_penalty_advantage(KL[keep], MASK[keep], GROUP[keep], ALL[:3], credit=credit, centre=True)
    assert whole[keep].tolist() == without.tolist() and whole[1].tolist() == [0, 0, 0]


def test_the_charge_carries_no_gradient_and_an_unknown_credit_is_refused() -> None:
    live = torch.ones(4, 3, requires_grad=True)
    assert not kl.kl_penalty_advantage(live, MASK, GROUP, ALL, credit="to_go", centre=True).requires_grad
    with pytest.raises(ValueError, match="credit 'token'"):
        kl.kl_penalty_advantage(live, MASK, GROUP, ALL, credit="token", centre=True)  # type: ignore[arg-type]


LOGPROBS = torch.tensor([[-1.0, -2.0, NAN], [-3.0, -torch.inf, NAN], [-9.0, -9.0, -9.0]])
REFERENCE = torch.tensor([[-2.0, -2.5, NAN], [-1.0, NAN, 0.0], [NAN, NAN, NAN]])
TOKENS = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
SCORED = torch.tensor([True, True, False])


def test_loss_sums_by_hand() -> None:
    """δ = 1, ½ and −2: sequences 1½ and −2."""
    found = kl.k2_sequence_loss_sum(LOGPROBS, REFERENCE, TOKENS, SCORED)
    assert found.item() == pytest.approx(0.5 * 1.5**2 + 0.5 * 2**2)
    found = kl.k3_token_loss_sum(LOGPROBS, REFERENCE, TOKENS, SCORED)
    assert found.item() == pytest.approx(math.exp(-1) + (math.exp(-0.5) - 0.5) + (math.exp(2) - 3))
    assert kl.exact_local_loss_sum(LOGPROBS, TOKENS, SCORED).item() == -6


@pytest.mark.parametrize("loss", [kl.k2_sequence_loss_sum, kl.k3_token_loss_sum])
def test_the_reference_is_frozen(loss: Callable[..., Tensor]) -> None:
    policy, reference = LOGPROBS.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    total = loss(policy, reference, TOKENS, SCORED)
    assert torch.autograd.grad(total, reference, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", ["k2_sequence_loss_sum", "k3_token_loss_sum"])
def test_loss_gradients_by_hand_and_exactly_zero_elsewhere(name: str) -> None:
    """½(Σδ)²: Σδ on each token of the row. k3: 1 − e^−δ."""
    live = LOGPROBS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(kl, name)(live, REFERENCE, TOKENS, SCORED), live)
    expected = {
        "k2_sequence_loss_sum": [1.5, 1.5, -2.0],
        "k3_token_loss_sum": [1 - math.exp(-1), 1 - math.exp(-0.5), 1 - math.exp(2)],
    }[name]
    assert gradient[TOKENS & SCORED[:, None]].tolist() == pytest.approx(expected)
    assert gradient[~(TOKENS & SCORED[:, None])].tolist() == [0] * 6
