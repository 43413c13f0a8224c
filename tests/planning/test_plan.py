"""Roles and phases of real sizes, against arithmetic that docs/planning.md shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.planning import cards, times
from rlhf.planning.layers import Forward
from rlhf.planning.placement import Kind, Placement
from rlhf.planning.plan import CONTEXT, FRAGMENTS, make_plan
from rlhf.planning.rollouts import decoding
from rlhf.planning.setup import Rollouts, forwards, scoring
from tests.planning.setups import seven_billion, two_billion

GIB = 2**30


def test_seven_billion_with_a_reward_model_of_27_on_eight_gpus() -> None:
    """The worked example of docs/planning.md, bytes by hand: N = 8,537,680,896 and M = 27,227,132,928 weights."""
    plan = make_plan(seven_billion())
    n, m = 8_537_680_896, 27_227_128_320 + 4_608
    policy, reference, judge = plan.roles
    assert policy.parts == {
        "weights": 2 * n / 8,  # 1.99 GiB
        "optimizer": 12 * n / 8,  # 11.9 GiB: masters and two moments
        "gradients": 2 * n / 8,
        "buckets": 2 * 500_000_000,  # 0.93 GiB
    }
    assert reference.parts == {"weights": 4 * n}  # 31.8 GiB
    assert judge.parts == {"weights": 2 * m}  # 50.7 GiB
    always = 1.99 + 11.93 + 1.99 + 0.93 + 31.81 + 50.71
    assert sum(role.total for role in plan.roles) / GIB == pytest.approx(always, abs=0.02)
    generation = plan.phases[0]
    assert generation.parts["weights gathered whole"] == 2 * n  # 15.9 GiB
    assert generation.parts["keys and values"] <= 4 * GIB
    assert not plan.fits and plan.usable == (80 * GIB - CONTEXT) * (1 - FRAGMENTS)


@pytest.mark.parametrize("kind", ["zero3", "fsdp2"])
def test_layers_are_gathered_in_place_of_the_whole(kind: Kind) -> None:
    """Gemma 7B in bfloat16: the embedding and the last norm, and two of 28 layers; each token then brings all 28 over
    the link, of which 60 % of 450 GB/s are counted on."""
    rest = 256_000 * 3_072 + 3_072
    trunk = 8_537_680_896 - rest
    setup = seven_billion(placement=Placement(kind=kind, processes=8))
    whole, layers = make_plan(setup), make_plan(replace(setup, rollouts=Rollouts(by_layer=True)))
    assert whole.phases[0].parts["weights gathered whole"] == 2 * (rest + trunk)
    assert layers.phases[0].parts["weights gathered by layer"] == 2 * (rest + 2 * trunk // 28)
    known, found = cards.card("h100"), layers.decoding
    assert found is not None
    longer = times.seconds(layers)["generation"] - times.seconds(whole)["generation"]
    tokens = 256 * found.wanted / found.rows
    assert longer == pytest.approx(tokens * 2 * trunk / (cards.LINK * known.link))


def test_the_phases_of_a_step_are_those_that_the_objective_has() -> None:
    names = [phase.name for phase in make_plan(seven_billion()).phases]
    assert names == ["generation", "scoring", "reference", "update", "optimizer step"]
    sft = make_plan(two_billion(program="sft", reference=None, compares=False))
    assert [phase.name for phase in sft.phases] == ["update", "optimizer step"] and sft.decoding is None


def test_an_adapter_makes_the_reference_free() -> None:
    plan = make_plan(two_billion(rank=16, reference=None))
    (policy,) = plan.roles
    adapter = plan.setup.policy.adapter(16)
    assert policy.parts == {"weights": 4 * (2_506_172_416 + adapter), "optimizer": 8 * adapter}
    assert plan.phases[1].name == "reference"


def test_forwards_are_cut_as_the_updater_cuts_them() -> None:
    """4 completions of 256 behind 512 tokens take 1,536 cells in one row, 3,072 in four: ten groups fit 16,384."""
    setup = seven_billion(placement=Placement(kind="zero3", processes=4))  # 32 prompts a process
    assert forwards(setup) == (Forward(10, 1536, 40 * 256, shared=True), 4)
    plain = replace(setup, step=replace(setup.step, share_prompts=False))
    assert forwards(plain) == (Forward(20, 768, 20 * 256), 7)


def test_long_groups_do_not_share_a_row_of_the_reward_model() -> None:
    """512 + m · 1,024 tokens stay within 4,096 for m = 3: two rows for four completions."""
    setup = seven_billion()
    long = replace(setup, step=replace(setup.step, completion=1024))
    assert scoring(long, long.judges[0])[0].width == 512 + 3 * 1024
    assert scoring(setup, setup.judges[0])[0] == Forward(10, 1536, 40, shared=True)


def test_a_cache_holds_as_many_rows_as_fit() -> None:
    """Gemma 2B under autocast: 18 layers · 256 · (4 + 2) bytes · 768 tokens a row; the loop counts 4 bytes a pair."""
    setup = two_billion(rollouts=Rollouts(kv_bytes=10 * 18 * 256 * 4 * 768 + 1))
    found = decoding(setup)
    assert (found.rows, found.wanted) == (10, 64)
    assert found.cache == 10 * 18 * 256 * (4 + 2) * 768


def test_vllm_takes_its_share_of_the_gpu() -> None:
    plan = make_plan(two_billion(rollouts=Rollouts(engine="vllm", gpu_fraction=0.25)))
    assert plan.roles[-1].total == 20 * GIB and plan.decoding is None


def test_more_memory_is_spared_and_less_is_missed() -> None:
    setup = two_billion()
    spare = [make_plan(replace(setup, machine=replace(setup.machine, memory=size * GIB))).spare for size in (40, 80)]
    assert spare[1] - spare[0] == pytest.approx(40 * GIB * (1 - FRAGMENTS))


def test_seconds_follow_operations_and_bytes() -> None:
    """The update of Gemma 2B on one H100: 6 operations a trunk weight and token, 8 if layers are computed again; 35 %
    of 989 TFLOP/s."""
    machine = replace(two_billion().machine, card="h100")
    plan = make_plan(two_billion(machine=machine))
    forward, count = forwards(plan.setup)
    work = 6 * (18 * 110_104_576 * forward.tokens + 524_288_000 * forward.positions) * count
    found = times.seconds(plan)
    assert found["update"] == pytest.approx(work / (0.35 * 989e12))
    again = replace(plan.setup, step=replace(plan.setup.step, activations="recompute"))
    assert times.seconds(make_plan(again))["update"] == pytest.approx(found["update"] * 8 / 6)
    assert times.seconds(make_plan(two_billion())) == {}
