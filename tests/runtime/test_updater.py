"""One update: equal to the closed form, and the same however the batch is cut, padded or ordered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import StatsRequest
from rlhf.models.layout import plain_rows
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Rollout
from rlhf.runtime.updater import Term
from tests.support import fixed_rollout, policy_and_reference, prepared, updater, weights, with_reference

EXACT = Reinforce(beta=0.3, estimator="exact")
OBJECTIVES = [
    Reinforce(beta=0.1),
    Reinforce(beta=0.1, credit="to_go"),
    Reinforce(beta=0.1, baseline="shrinkage"),
    Reinforce(beta=0.1, baseline="none", loss_beta=0.2),
    Reinforce(beta=0.0, loss_beta=0.2, loss_estimator="k3"),
    Reinforce(beta=0.1, loss_beta=0.2, loss_estimator="exact_local"),
    EXACT,
]


def change(rollout: Rollout, objective: Reinforce, budget: int = 100, chunk_bytes: int = 2**20) -> Tensor:
    """Minus the gradient of one update, as one vector."""
    model, reference = policy_and_reference(chunk_bytes=chunk_bytes)
    rollout = prepared(with_reference(rollout, reference), objective)
    before = weights(model)
    updater(model, reference, budget).step([Term(objective=objective, batch=rollout)], 1)
    return weights(model) - before


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def test_one_update_is_the_closed_form_of_leave_one_out_reinforce() -> None:
    """−mean_i A_i Σ_t log π(y_it), A = R − LOO(R), R = r − β Σ_t (log π − log π_ref): TRL's RLOO on-policy."""
    beta, k = 0.1, 4
    rollout = fixed_rollout()
    got = change(rollout, Reinforce(beta=beta))
    model, reference = policy_and_reference()
    sums = []
    for row in range(len(rollout)):  # one unpadded row at a time, through the plain causal LM
        ids = torch.cat(
            [
                rollout.prompt_ids[row][rollout.prompt_mask[row]],
                rollout.completion_ids[row][rollout.completion_mask[row]],
            ]
        )
        at = int(rollout.prompt_mask[row].sum())
        both = [
            lm(ids[None]).logits[0, at - 1 : -1].log_softmax(-1) for lm in (model.causal_lm, reference.model.causal_lm)
        ]
        sums.append([full.gather(-1, ids[at:, None]).sum() for full in both])
    logp, ref = (torch.stack(column) for column in zip(*sums, strict=True))
    assert rollout.rewards is not None
    penalized = (rollout.rewards - beta * (logp - ref).detach()).view(-1, k)
    advantages = (penalized - (penalized.sum(1, keepdim=True) - penalized) / (k - 1)).flatten()
    (-(advantages * logp).mean()).backward()
    expected = -torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float((got - expected).abs().max()) <= 1e-6  # fp32, gradients up to about 1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.estimator}-{o.credit}-{o.baseline}-{o.loss_beta}")
def test_gradient_does_not_depend_on_the_microbatch_split(objective: Reinforce) -> None:
    rollout = fixed_rollout()
    whole = change(rollout, objective, budget=10_000)
    for budget in (1, 100):  # one group at a time; a few
        assert difference(whole, change(rollout, objective, budget=budget)) <= 2e-6  # fp32 sums in another order


@pytest.mark.parametrize("objective", [Reinforce(beta=0.1), EXACT], ids=["k1", "exact"])
def test_gradient_does_not_depend_on_row_order(objective: Reinforce) -> None:
    rollout = fixed_rollout()
    shuffled = rollout.select(torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3)))
    assert difference(change(rollout, objective), change(shuffled, objective)) <= 2e-6


def widened(rollout: Rollout, left: int, right: int, junk: int) -> Rollout:
    """More padding on both sides, filled with a real token id: masks decide, not ids."""
    rows = len(rollout)

    def grow(value: Tensor, name: str) -> Tensor:
        fill = junk if value.dtype == torch.long else 0
        width, first = (left, True) if name.startswith("prompt") else (right, False)
        pad = torch.full((rows, width), fill, dtype=value.dtype)
        return torch.cat([pad, value] if first else [value, pad], dim=1)

    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return replace(rollout, **{name: grow(getattr(rollout, name), name) for name in names})


def test_gradient_does_not_depend_on_padding() -> None:
    rollout, objective = fixed_rollout(), Reinforce(beta=0.1)
    narrow = change(rollout, objective)
    for left, right in ((5, 0), (0, 7), (3, 2)):
        assert difference(narrow, change(widened(rollout, left, right, junk=9), objective)) <= 2e-6


def test_wide_padding_reaches_the_model_and_changes_nothing() -> None:
    """The updater trims microbatches; the forward itself must not care either."""
    model, _ = policy_and_reference()
    rollout = fixed_rollout()
    narrow = token_stats(model, plain_rows(rollout), StatsRequest()).logprobs
    wide = token_stats(model, plain_rows(widened(rollout, 6, 4, junk=9)), StatsRequest()).logprobs
    width = narrow.shape[1]
    torch.testing.assert_close(wide[:, :width], narrow, atol=2e-6, rtol=0)
    assert bool((wide[:, width:] == 0).all()) and bool((narrow[~rollout.completion_mask] == 0).all())


@pytest.mark.parametrize("objective", [Reinforce(beta=0.1), EXACT], ids=["k1", "exact"])
def test_chunked_head_gives_the_unchunked_gradient(objective: Reinforce) -> None:
    rollout = fixed_rollout()
    three_positions = 3 * 4 * 300
    assert difference(change(rollout, objective), change(rollout, objective, chunk_bytes=three_positions)) <= 2e-6


def test_equal_rewards_without_kl_change_nothing() -> None:
    rollout = fixed_rollout(rewards=torch.full((16,), 3.7))
    assert bool((change(rollout, Reinforce(beta=0.0)) == 0).all())


def test_a_constant_added_to_rewards_changes_nothing_under_leave_one_out() -> None:
    rollout = fixed_rollout()
    assert rollout.rewards is not None
    moved = replace(rollout, rewards=rollout.rewards + 100.0)
    for objective in (Reinforce(beta=0.1), EXACT):
        # 100 costs fp32 rewards about 100·2⁻²⁴ = 6e-6 of absolute precision
        assert difference(change(rollout, objective), change(moved, objective)) <= 2e-5


@pytest.mark.parametrize("objective", [Reinforce(beta=0.5), Reinforce(beta=0.5, credit="to_go"), EXACT])
def test_kl_is_exactly_zero_before_the_first_update(objective: Reinforce) -> None:
    """Policy = reference: KL 0 to the last bit, so equal rewards give a zero update even with a penalty."""
    model, reference = policy_and_reference(shift=0.0)
    rollout = fixed_rollout(rewards=torch.ones(16))
    rollout = prepared(with_reference(rollout, reference), objective)
    report = updater(model, reference).step([Term(objective=objective, batch=rollout)], 1)
    known = report.stats[0].ref_logprobs if report.stats[0].ref_logprobs is not None else rollout.ref_logprobs
    assert torch.equal(report.stats[0].logprobs, known)
    if report.stats[0].kl is not None:
        assert bool((report.stats[0].kl == 0).all())
    assert report.grad_norm <= 1e-6  # the exact KL's gradient at 0 is rounding noise, π·(0 − 0) summed over V


def test_invalid_rows_leave_the_gradient() -> None:
    """Rows that could not be scored: the same update as if they had never been sampled."""
    rollout = fixed_rollout()
    assert rollout.rewards is not None
    keep = torch.tensor([row for row in range(16) if row not in (1, 7)])
    broken = rollout.rewards.clone()
    broken[[1, 7]] = float("nan")
    valid = torch.isfinite(broken)
    marked = replace(rollout, rewards=broken, valid=valid)
    for objective in (Reinforce(beta=0.1), Reinforce(beta=0.1, credit="to_go"), EXACT):
        assert difference(change(rollout.select(keep), objective), change(marked, objective)) <= 2e-6


def test_non_finite_gradients_skip_the_step() -> None:
    model, reference = policy_and_reference()
    rollout = prepared(with_reference(fixed_rollout(), reference), Reinforce(beta=0.1))
    assert rollout.advantages is not None
    poisoned = replace(rollout, advantages=rollout.advantages * float("inf"))
    before = weights(model)
    report = updater(model, reference).step([Term(objective=Reinforce(beta=0.1), batch=poisoned)], 1)
    assert not report.applied and torch.equal(weights(model), before)


def test_statistics_come_back_in_row_order() -> None:
    model, reference = policy_and_reference()
    rollout = prepared(with_reference(fixed_rollout(), reference), EXACT)
    direct = token_stats(model, plain_rows(rollout), StatsRequest(entropy=True)).logprobs.detach()
    report = updater(model, reference, budget=1).step([Term(objective=EXACT, batch=rollout)], 1)
    torch.testing.assert_close(report.stats[0].logprobs, direct, atol=2e-6, rtol=0)


def test_trust_in_the_support() -> None:
    """The tests above mean nothing if the policy sits on its reference or the advantages vanish."""
    model, reference = policy_and_reference()
    assert isinstance(model, ScoredModel) and isinstance(reference, FrozenReference)
    rollout = prepared(with_reference(fixed_rollout(), reference), Reinforce(beta=0.1))
    logprobs = token_stats(model, plain_rows(rollout), StatsRequest()).logprobs.detach()
    assert float((logprobs - rollout.ref_logprobs).abs().max()) > 0.05
    assert rollout.advantages is not None and float(rollout.advantages.std()) > 0.5
