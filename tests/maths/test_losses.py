from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.maths import logprobs, losses

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
VALID = torch.tensor([True, True, False])
COUNTED = MASK & VALID[:, None]
# Everything that does not count is NaN or infinite.
POISON = torch.tensor([[-1.0, -2.0, NAN], [-3.0, -torch.inf, NAN], [NAN, -torch.inf, torch.inf]])
CLEAN = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
PER_ROW = torch.tensor([2.0, -1.0, NAN])
PER_TOKEN = torch.tensor([[2.0, 5.0, NAN], [-1.0, NAN, NAN], [NAN, NAN, NAN]])

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "policy_gradient": lambda x: losses.policy_gradient_sum(x, PER_ROW, MASK, VALID),
    "policy_gradient per token": lambda x: losses.policy_gradient_sum(x, PER_TOKEN, MASK, VALID),
    "clipped": lambda x: losses.clipped_surrogate_sum(x, POISON, PER_ROW, MASK, VALID, 0.2, 0.2)[0],
    "value": lambda x: losses.value_loss_sum(x, POISON, 1 + POISON, MASK, 0.2, VALID),
    "nll": lambda x: losses.nll_sum(x, MASK, VALID),
}
GRADIENTS = {
    "policy_gradient": [-2.0, -2.0, 1.0],
    "policy_gradient per token": [-2.0, -5.0, 1.0],
    "clipped": [-2.0, -2.0, 1.0],
    "value": [-1.0, -1.0, -1.0],
    "nll": [-1.0, -1.0, -1.0],
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_count_is_exactly_zero_in_value_and_gradient(name: str) -> None:
    live = POISON.clone().requires_grad_()
    total = LOSSES[name](live)
    (gradient,) = torch.autograd.grad(total, live)
    assert total.isfinite()
    assert gradient[~COUNTED].tolist() == [0] * 6
    assert gradient[COUNTED].tolist() == pytest.approx(GRADIENTS[name])


def test_policy_gradient_by_hand() -> None:
    """−(2·(−1 − 2) + (−1)·(−3)) = 3; per token −(2·−1 + 5·−2 + (−1)·−3) = 9."""
    assert LOSSES["policy_gradient"](POISON).item() == 3
    assert LOSSES["policy_gradient per token"](POISON).item() == 9


def test_advantages_get_no_gradient() -> None:
    live, logprobs = torch.ones(3, requires_grad=True), CLEAN.clone().requires_grad_()
    total = losses.policy_gradient_sum(logprobs, live, MASK, VALID)
    clipped, _ = losses.clipped_surrogate_sum(logprobs, CLEAN, live, MASK, VALID, 0.2, 0.2)
    assert torch.autograd.grad(total + clipped, live, allow_unused=True)[0] is None


def test_sums_add_up_over_microbatches() -> None:
    whole = losses.policy_gradient_sum(POISON, PER_ROW, MASK, VALID)
    parts = [
        losses.policy_gradient_sum(POISON[i : i + 1], PER_ROW[i : i + 1], MASK[i : i + 1], VALID[i : i + 1])
        for i in range(3)
    ]
    assert whole.item() == sum(part.item() for part in parts)


def test_length_normalised_by_hand() -> None:
    assert losses.length_normalised(torch.tensor([6.0, 6.0, 6.0]), MASK).tolist() == [3, 6, 2]
    assert losses.length_normalised(torch.full((3, 3), 6.0), MASK)[:, 0].tolist() == [3, 6, 2]


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 2 and ½ with clip .2/.4. A > 0: 1.4 and ½; A < 0: −3·2 and −3·.8. Two tokens lose their gradient."""
    ratio = torch.tensor([[2.0, 0.5], [2.0, 0.5]]).log().requires_grad_()
    old, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    total, count = losses.clipped_surrogate_sum(ratio, old, torch.tensor([1.0, -3.0]), mask, mask[:, 0], 0.2, 0.4)
    assert total.item() == pytest.approx(-(1.4 + 0.5 - 6 - 2.4))
    assert count.item() == 2
    (gradient,) = torch.autograd.grad(total, ratio)
    assert gradient.flatten().tolist() == pytest.approx([0, -0.5, 6, 0])


@pytest.mark.parametrize("clip", [0.0, 0.2, 1e9])
def test_ppo_at_the_old_policy_is_reinforce_to_the_last_bit(clip: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, 5, generator=generator), torch.randn(5, 7, generator=generator)
    targets = torch.randint(7, (6, 4), generator=generator)
    advantages = torch.randn(6, generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 4])[:, None]
    valid = torch.tensor([True] * 5 + [False])

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        live = weight.clone().requires_grad_()
        return torch.autograd.grad(loss(logprobs.token_logprobs(hidden @ live, targets)), live)[0]

    old = logprobs.token_logprobs(hidden @ weight, targets)
    _, clipped = losses.clipped_surrogate_sum(old, old, advantages, mask, valid, clip, clip)
    assert clipped.item() == 0
    ppo = gradient(lambda x: losses.clipped_surrogate_sum(x, old, advantages, mask, valid, clip, clip)[0])
    assert torch.equal(ppo, gradient(lambda x: losses.policy_gradient_sum(x, advantages, mask, valid)))


def test_sequence_importance_weights_by_hand() -> None:
    """Ratios of whole completions: 2·3 = 6, ½ (its pad ignored), and an invalid row."""
    old = torch.zeros(3, 2)
    new = torch.tensor([[2.0, 3.0], [0.5, NAN], [NAN, NAN]]).log()
    mask, valid = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), torch.tensor([True, True, False])
    weights, truncated = losses.sequence_importance_weights(new, old, mask, valid, cap=4.0)
    assert weights.tolist() == pytest.approx([4, 0.5, 0]) and truncated.item() == 1


def test_mismatch_weights_by_hand() -> None:
    """Token by token: 3 cut to 2, ½, and 1 where nothing counts."""
    own = torch.tensor([[3.0, 0.5, NAN]]).log().requires_grad_()
    weights = losses.mismatch_weights(own, torch.zeros(1, 3), torch.tensor([[True, True, False]]), cap=2.0)
    assert weights.tolist() == [pytest.approx([2, 0.5, 1])] and not weights.requires_grad


def test_mismatch_weights_give_the_gradient_of_the_policy() -> None:
    """One token, sampled from q: Σ_a q(a)·w(a)·A(a)·∇log π(a) is Σ_a π(a)·A(a)·∇log π(a)."""
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.arange(6, dtype=torch.float64)
    log_q = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    log_pi = logits.log_softmax(0)
    weights = losses.mismatch_weights(log_pi[:, None], log_q[:, None], torch.ones(6, 1, dtype=torch.bool), cap=1e9)[
        :, 0
    ]
    weighted = torch.autograd.grad((log_q.exp() * weights * advantages * log_pi).sum(), logits, retain_graph=True)[0]
    expected = torch.autograd.grad((log_pi.exp() * advantages).sum(), logits)[0]
    torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=1e-14)


def test_value_loss_by_hand() -> None:
    """V = 1, 3; old 0, 3; target 2, 2. Plain ½(1 + 1); clipped at ±.5 the first is at .5, error 1.5² = 2.25."""
    values, old, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert losses.value_loss_sum(values, old, target, mask).item() == 1
    assert losses.value_loss_sum(values, old, target, mask, clip=0.5).item() == pytest.approx(0.5 * (2.25 + 1))
    assert losses.value_loss_sum(values, old, target, mask, valid=torch.tensor([False])).item() == 0


def test_bradley_terry_by_hand() -> None:
    assert losses.bradley_terry_sum(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(3 * math.log(2))
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    total = losses.bradley_terry_sum(chosen, rejected, torch.tensor([0.5]))
    assert total.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    by_chosen, by_rejected = torch.autograd.grad(total, (chosen, rejected))
    slope = 1 / (1 + math.exp(0.5))
    assert (by_chosen.item(), by_rejected.item()) == pytest.approx((-slope, slope))
    assert losses.bradley_terry_sum(torch.tensor([-1e4]), torch.tensor([0.0])).item() == pytest.approx(1e4)


def test_nll_by_hand() -> None:
    assert losses.nll_sum(POISON, MASK, VALID).item() == 6
