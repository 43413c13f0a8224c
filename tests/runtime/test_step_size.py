"""Steps measured in KL: the limit, and TRPO's direction against the matrix that it stands for, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.maths.conjugate_gradient import conjugate_gradient
from rlhf.maths.logprobs import log_softmax
from rlhf.models.layout import SharedPrompts, plain_rows
from rlhf.models.load import LoraSpec, add_lora
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Rollout
from rlhf.runtime import step_size
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.step_size import Before, KlLimit, TrustRegion
from rlhf.runtime.updater import PolicyForward, Term, Updater
from tests.support import alone, fixed_rollout, policy_and_reference, prepared, tiny_lm, weights, with_reference

OBJECTIVE = Reinforce(beta=0.1)


def set_up(rows: int = 4, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[ScoredModel, Rollout, Any]:
    """A policy, a prepared rollout and the reference."""
    policy, reference = policy_and_reference()
    policy, reference = policy.to(dtype), FrozenReference(reference.model.to(dtype))
    rollout = with_reference(fixed_rollout(prompts=rows), reference)
    return policy, prepared(rollout, OBJECTIVE), reference


def before(policy: ScoredModel, budget: int = 100) -> Before:
    return Before.of(alone(), policy, policy, budget)


def exact_kl(new: ScoredModel, old: ScoredModel, rollout: Rollout) -> float:
    """Row by row with plain logits: Σ_t KL(new‖old) a completion, a mean over completions."""
    total = 0.0
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            p, q = (log_softmax(m.causal_lm(ids).logits[0, len(prompt) - 1 : -1], 1.0) for m in (new, old))
        total += float((p.exp() * (p - q)).sum())
    return total / len(rollout)


def limited(
    policy: ScoredModel, reference: FrozenReference, limit: float | None, lr: float, budget: int = 100
) -> Updater:
    kl_limit = KlLimit(before(policy, budget), limit) if limit is not None else None
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    forward = PolicyForward(reference)
    return Updater(alone(), policy, optimizer, lambda step: lr, forward, budget, None, limit=kl_limit)


# --- the limit -------------------------------------------------------------------------------------------------------


def test_a_long_step_is_shortened_along_its_own_line() -> None:
    policy, rollout, reference = set_up()
    start, old = weights(policy), copy.deepcopy(policy)
    free, _, _ = set_up()
    limited(free, reference, None, 0.005).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    far = exact_kl(free, old, rollout)
    report = limited(policy, reference, far / 4, 0.005).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    share = report.measured["optim/step_share"]
    assert share == pytest.approx(1 / 2, rel=0.05)  # KL is quadratic near π_old, up to the third order
    torch.testing.assert_close(weights(policy) - start, (weights(free) - start) * share, rtol=1e-3, atol=1e-6)
    assert exact_kl(policy, old, rollout) == pytest.approx(report.measured["optim/step_kl"], rel=1e-3)
    assert report.measured["optim/step_kl"] == pytest.approx(far / 4, rel=0.06)


def test_a_step_that_is_far_too_long_is_shortened_until_it_fits() -> None:
    """Far from π_old the KL is not quadratic: one cut by √(limit/KL) leaves 1.6 times the limit here."""
    policy, rollout, reference = set_up()
    old = copy.deepcopy(policy)
    report = limited(policy, reference, 0.06, 0.05).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    assert exact_kl(policy, old, rollout) <= 0.06 * 1.06
    assert 0.1 < report.measured["optim/step_share"] < 0.3


def test_a_short_step_is_left_alone_and_measured() -> None:
    policy, rollout, reference = set_up()
    free, _, _ = set_up()
    limited(free, reference, None, 1e-3).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    report = limited(policy, reference, 10.0, 1e-3).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    assert torch.equal(weights(policy), weights(free))
    assert report.measured["optim/step_share"] == 1 and 0 < report.measured["optim/step_kl"] < 10


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_the_measure_does_not_depend_on_the_microbatches(budget: int) -> None:
    policy, rollout, _ = set_up()
    old = copy.deepcopy(policy)
    ruler = before(policy, budget)
    assert ruler.kl(rollout, 1.0) == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    assert ruler.kl(rollout, 1.0) == pytest.approx(exact_kl(policy, old, rollout), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_with_an_adapter_the_base_is_not_copied() -> None:
    policy = ScoredModel(add_lora(tiny_lm(), LoraSpec(r=2, alpha=4.0), seed=0))
    ruler = before(policy)
    mine, copied = dict(policy.causal_lm.named_parameters()), dict(ruler.old.model.causal_lm.named_parameters())
    for name, parameter in mine.items():
        assert (parameter is copied[name]) is not parameter.requires_grad
    assert {id(now) for now, _ in ruler.weights()} == {id(p) for p in mine.values() if p.requires_grad}


def test_shards_are_refused() -> None:
    sharded = Runtime(accelerator=None, kind="zero2", device=torch.device("cpu"))
    policy, _, _ = set_up()
    with pytest.raises(UserError, match="zero2 holds them in shards"):
        Before.of(sharded, policy, policy, 100)


def test_a_model_that_is_too_large_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _, _ = set_up()
    step_size.refuse_lack_of_memory(policy, alone())
    size = sum(p.numel() for p in policy.parameters()) * 4
    monkeypatch.setattr(step_size, "_free_bytes", lambda runtime: 9 * size - 1)
    with pytest.raises(UserError, match=r"9 copies of the trained weights: .* GiB are free; train an adapter"):
        step_size.refuse_lack_of_memory(policy, alone())


# --- conjugate gradient ----------------------------------------------------------------------------------------------


def test_conjugate_gradient_solves_by_hand() -> None:
    """[[4, 1], [1, 3]]·x = (1, 2): x = (1/11, 7/11), in two products."""
    matrix, target = torch.tensor([[4.0, 1], [1, 3]], dtype=torch.float64), torch.tensor([1.0, 2], dtype=torch.float64)
    products: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        products.append(vector)
        return matrix @ vector

    assert conjugate_gradient(product, target, 10).tolist() == pytest.approx([1 / 11, 7 / 11], abs=1e-14)
    assert len(products) == 2
    one = conjugate_gradient(lambda v: matrix @ v, target, 1)  # the steepest descent step (5/20)·b
    assert one.tolist() == pytest.approx([0.25, 0.5], abs=1e-14)


def test_conjugate_gradient_stops_where_there_is_no_curvature() -> None:
    found = conjugate_gradient(lambda v: -v, torch.ones(3), 5)
    assert not bool(found.any())


# --- TRPO ------------------------------------------------------------------------------------------------------------


def trust_region(policy: ScoredModel, reference: FrozenReference, **settings: Any) -> TrustRegion:
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    forward, ruler = PolicyForward(reference), before(policy)
    return TrustRegion(alone(), policy, optimizer, lambda step: 1.0, forward, 100, None, before=ruler, **settings)


def small(dtype: torch.dtype) -> tuple[ScoredModel, Rollout, FrozenReference]:
    """A Gemma of some 1,700 weights, whose Fisher matrix can be written down."""
    shape: dict[str, Any] = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, head_dim=4)
    lm = tiny_lm(0, num_attention_heads=1, initializer_range=0.5, **shape)
    policy = ScoredModel(lm).to(dtype)
    reference = FrozenReference(copy.deepcopy(policy))
    rollout = prepared(with_reference(fixed_rollout(prompts=2, k=2), reference), OBJECTIVE)
    return policy, rollout, reference


def fisher(policy: ScoredModel, rollout: Rollout) -> Tensor:
    """Σ over positions of Jᵀ(diag p − ppᵀ)J, over completions, from the Jacobian of plain logits, in float64."""
    parameters = list(policy.causal_lm.parameters())
    matrix = torch.zeros(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters), dtype=torch.float64)
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        logits = policy.causal_lm(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        for position in logits:
            p = position.detach().softmax(-1)
            # √p_v·(∂ log p_v): its outer products summed are the Fisher matrix of the position
            rows = []
            for value in (position.log_softmax(-1) * p.sqrt()).unbind():
                parts = torch.autograd.grad(value, parameters, retain_graph=True)
                rows.append(torch.cat([part.flatten() for part in parts]))
            jacobian = torch.stack(rows)
            matrix += jacobian.T @ jacobian
    return matrix / len(rollout)


def test_the_direction_is_the_damped_natural_gradient() -> None:
    """(F + λI)⁻¹g by a dense solve. F alone is singular: it has more columns than positions × vocabulary has rank."""
    policy, rollout, reference = small(torch.float64)
    region = trust_region(policy, reference, damping=0.05, iterations=400)
    term = Term(objective=OBJECTIVE, batch=rollout)
    region.accumulate([term], region.forward)
    gradient = torch.cat([p.grad.flatten() for p in policy.causal_lm.parameters() if p.grad is not None])
    policy.zero_grad()
    region.before.remember()  # type: ignore[union-attr]
    found = region.natural_direction(gradient, term)
    matrix = fisher(policy, rollout)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert float(eigenvalues[0]) < 1e-8 * float(eigenvalues[-1])
    expected = torch.linalg.solve(matrix + 0.05 * torch.eye(len(gradient), dtype=torch.float64), gradient)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    plain = gradient * (gradient @ expected) / (gradient @ gradient)
    assert float((plain - expected).norm() / expected.norm()) > 0.3  # the matrix matters


def test_single_precision_finds_nearly_the_same_direction() -> None:
    directions = []
    for dtype in (torch.float64, torch.float32):
        policy, rollout, reference = small(dtype)
        region = trust_region(policy, reference, damping=0.1, iterations=10)
        term = Term(objective=OBJECTIVE, batch=rollout)
        region.accumulate([term], region.forward)
        gradient = step_size._taken([now for now, _ in region.before.weights()])  # type: ignore[union-attr]
        region.before.remember()  # type: ignore[union-attr]
        directions.append(region.natural_direction(gradient, term).double())
    # Differences of gradients keep about 3 of fp32's 7 digits.
    assert float((directions[0] - directions[1]).norm() / directions[0].norm()) < 1e-2


@pytest.mark.parametrize("max_kl", [1e-3, 0.05])
def test_the_step_stays_within_its_radius_and_goes_downhill(max_kl: float) -> None:
    policy, rollout, reference = set_up()
    old = copy.deepcopy(policy)
    report = trust_region(policy, reference, max_kl=max_kl).step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    moved = exact_kl(policy, old, rollout)
    assert report.applied and moved == pytest.approx(report.measured["optim/step_kl"], rel=1e-3)
    assert 0.2 * max_kl < moved <= max_kl * 1.001
    assert surrogate(policy, old, rollout) > 0
    assert all(p.grad is None for p in policy.parameters())


def surrogate(new: ScoredModel, old: ScoredModel, rollout: Rollout) -> float:
    """Σ A·(log π_new − log π_old) with the leave-one-out advantages: what the gradient promises."""
    rows, request = plain_rows(rollout), StatsRequest()
    from rlhf.models.policy import token_stats

    with torch.no_grad():
        change = token_stats(new, rows, request).logprobs - token_stats(old, rows, request).logprobs
    assert rollout.advantages is not None
    return float((torch.where(rollout.completion_mask, change, 0.0).sum(1) * rollout.advantages).sum())


def test_where_no_step_fits_nothing_moves() -> None:
    policy, rollout, reference = set_up()
    start = weights(policy)
    region = trust_region(policy, reference, max_kl=0.05, backtracks=0)
    object.__setattr__(region.before, "kl", lambda *_: math.inf)
    report = region.step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    assert report.measured["optim/step_share"] == 0 and torch.equal(weights(policy), start)


def test_without_curvature_the_step_follows_the_gradient() -> None:
    policy, rollout, reference = set_up()
    old, region = copy.deepcopy(policy), trust_region(policy, reference, max_kl=0.05)
    object.__setattr__(region, "natural_direction", lambda gradient, term: torch.zeros_like(gradient))
    report = region.step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    assert 0 < report.measured["optim/step_kl"] <= 0.05 and surrogate(policy, old, rollout) > 0


def test_a_step_into_nothing_is_undone() -> None:
    policy, rollout, reference = set_up()
    start, updater = weights(policy), limited(policy, reference, 0.1, 0.01)
    assert updater.limit is not None
    object.__setattr__(updater.limit.before, "kl", lambda *_: math.nan)  # type: ignore[attr-defined]
    report = updater.step([Term(objective=OBJECTIVE, batch=rollout)], 1)
    assert report.measured["optim/step_share"] == 0 and torch.equal(weights(policy), start)


def test_no_forward_of_a_step_is_wider_than_the_budget() -> None:
    """Rows share their prompts in everything that a step runs, since the batch was cut for that."""
    policy, rollout, reference = set_up(rows=4)
    long = replace(rollout, prompt_ids=rollout.prompt_ids.repeat(1, 6), prompt_mask=rollout.prompt_mask.repeat(1, 6))
    layout, budget, seen = SharedPrompts(), 80, list[int]()  # two groups in rows of their own; plain they are 200
    ruler = Before.of(alone(), policy, policy, budget, layout)
    for model in (policy, ruler.old.model, reference.model):
        model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"].numel()), with_kwargs=True)
    forward, optimizer = PolicyForward(reference, layout), torch.optim.SGD(policy.parameters(), lr=1.0)
    settings: dict[str, Any] = {"before": ruler, "max_kl": 0.01, "damping": 0.1, "iterations": 2, "backtracks": 2}
    step = TrustRegion(
        alone(), policy, optimizer, lambda step: 1.0, forward, budget, None, cost=layout.cells, **settings
    )
    step.step([Term(objective=OBJECTIVE, batch=long)], 1)
    assert len(seen) > 8 and max(seen) <= budget
