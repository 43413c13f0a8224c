"""The smallest change that fits: alone and in order first, then together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.planning import changes
from rlhf.planning.placement import Placement
from rlhf.planning.plan import CONTEXT, FRAGMENTS, make_plan
from rlhf.planning.setup import Rollouts, Setup
from tests.planning.setups import seven_billion, two_billion

GIB = 2**30


def on(gib: float, setup: Setup) -> Setup:
    return replace(setup, machine=replace(setup.machine, memory=gib * GIB))


def test_what_fits_needs_no_change() -> None:
    assert make_plan(on(200, two_billion())).fits and changes.smallest(on(200, two_billion())) is None


def test_recomputing_comes_first() -> None:
    found = changes.smallest(on(80, two_billion()))
    assert found is not None and found.set == ("batch.activations=recompute",)
    assert make_plan(found.setup).fits


def test_shards_come_before_a_smaller_microbatch() -> None:
    setup = seven_billion(judges=(), placement=Placement(kind="ddp", processes=8))
    assert not make_plan(setup).fits
    found = changes.smallest(setup)
    assert found is not None and found.set == ("--accelerate zero2",)


def test_a_smaller_microbatch_is_the_largest_that_fits() -> None:
    """The memory that 8,192 tokens a forward need, and a little."""
    setup = seven_billion(program="sft", judges=(), reference=None, compares=False)
    least = make_plan(replace(setup, step=replace(setup.step, microbatch=8192))).peak.total
    gib = (least / (1 - FRAGMENTS) + CONTEXT) / GIB + 0.01
    for budget, fits in ((16384, False), (8192, True)):
        assert make_plan(on(gib, replace(setup, step=replace(setup.step, microbatch=budget)))).fits is fits
    found = changes.smallest(on(gib, setup))
    assert found is not None and found.set == ("batch.microbatch_tokens=8192",)


def test_changes_are_added_up_where_none_is_enough() -> None:
    found = changes.smallest(seven_billion(step=replace(seven_billion().step, activations="keep")))
    assert found is not None and len(found.set) > 1 and make_plan(found.setup).fits
    assert found.set[0] == "batch.activations=recompute"


def test_frozen_models_in_shards_make_room_for_seven_billion() -> None:
    """The documented example: an eighth of 31.81 and 50.71 GiB in place of all of it."""
    setup = seven_billion()
    found = changes.smallest(setup)
    assert found is not None
    assert found.set == ("reward.models.0.placement=zero3", "reference.placement=zero3")
    before, after = (sum(role.total for role in make_plan(each).roles) / GIB for each in (setup, found.setup))
    assert before - after == pytest.approx((31.81 + 50.71) * 7 / 8, abs=0.01)
    assert after == pytest.approx(27.15, abs=0.01)
    scoring = next(phase for phase in make_plan(found.setup).phases if phase.name == "scoring")
    assert scoring.parts["weights of the reward model"] == 2e9  # no more than 10⁹ weights are gathered


def test_nothing_is_suggested_where_nothing_fits() -> None:
    assert changes.smallest(on(2, seven_billion())) is None


def test_layers_are_gathered_where_the_whole_does_not_fit() -> None:
    """A policy whose whole copy is the peak, beside a cache of one row: nothing earlier in the order helps."""
    setup = seven_billion(judges=(), reference=None, compares=False, rollouts=Rollouts(kv_bytes=1))
    setup = replace(setup, step=replace(setup.step, microbatch=1024))
    layered = make_plan(replace(setup, rollouts=replace(setup.rollouts, by_layer=True))).peak.total
    assert make_plan(setup).peak.name == "generation"
    found = changes.smallest(on((layered / (1 - FRAGMENTS) + CONTEXT) / GIB + 0.01, setup))
    assert found is not None and found.set == ("rollout.gather=layers",)
    assert changes.by_layer(found.setup) is None


def test_the_order_is_the_documented_one() -> None:
    names = [step.__name__ for step in changes.ORDER]
    assert names == [
        *("recompute", "zero2", "zero3", "frozen_shares", "smaller_microbatch", "smaller_cache"),
        *("by_layer", "offload", "lora", "qlora", "quantized_judges", "reward_server", "more_gpus"),
    ]


def test_room_is_the_largest_that_still_fits() -> None:
    plan = make_plan(on(200, two_billion()))
    budget = changes.largest_microbatch(plan)
    step = plan.setup.step
    assert make_plan(replace(plan.setup, step=replace(step, microbatch=budget))).fits
    assert 0 < changes.largest_cache(plan) * GIB <= plan.decoding.needed  # type: ignore[union-attr]
