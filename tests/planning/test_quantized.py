"""Bytes of quantized models: as planned, and as a loaded model holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rlhf.assemble.models import refuse_what_needs_whole_weights
from rlhf.errors import UserError
from rlhf.models.load import load_causal_lm
from rlhf.models.quantized import Bits, Quantization, held_bytes
from rlhf.models.scratch import build_causal_lm, build_config
from rlhf.planning.changes import qlora, quantized_judges, zero3
from rlhf.planning.frozen import whole_bytes
from rlhf.planning.plan import make_plan
from rlhf.planning.shapes import read_shape
from rlhf.programs.plan import Options, plan_of
from rlhf.recipe import load_recipe
from rlhf.runtime.distributed import Runtime
from tests.planning.setups import seven_billion, two_billion
from tests.planning.test_shapes import shape
from tests.support import needs


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_loaded_model_holds_what_was_planned(tmp_path: Path, bits: Bits) -> None:
    """To 2 %: 4 bits come with two small tables a matrix (1.1 KB), which are nothing beside large ones."""
    config = build_config("gemma2", layers=2, hidden_size=256, heads=4, vocab_size=512)
    build_causal_lm(config, 0).save_pretrained(tmp_path)
    planned = whole_bytes(read_shape(config, name="x", source="test"), 4, bits)
    held = held_bytes(load_causal_lm(str(tmp_path), quantize=Quantization(bits)))
    assert planned == pytest.approx(held, rel=0.02)
    assert planned == pytest.approx(held, rel=1e-6) or bits == "4bit"


def test_by_hand() -> None:
    """Gemma 2 27B: 46 layers; queries and output 4608·4096, keys and values 4608·2048, three of 4608·36864."""
    large = shape("google/gemma-2-27b")
    assert large.packable == 46 * (2 * 4608 * 4096 + 2 * 4608 * 2048 + 3 * 4608 * 36864)
    assert large.packable_rows == 46 * (4096 + 4608 + 2 * 2048 + 2 * 36864 + 4608)
    assert large.packed("8bit") == large.packable + 4 * large.packable_rows
    assert large.packed("4bit") == pytest.approx(large.packable * 4.127 / 8, rel=1e-4)  # QLoRA: 4.127 bits a weight
    assert whole_bytes(large, 2, None) == 2 * large.parameters


def test_the_heads_are_left_whole() -> None:
    untied = shape("EleutherAI/pythia-1b-deduped")
    assert untied.packable == 16 * 12 * 2048**2  # of a layer: queries, keys, values, output, and an MLP of four widths
    assert untied.as_scalar().packable == untied.packable


def test_a_quantized_policy_holds_few_bytes_and_its_adapter() -> None:
    lora = replace(two_billion(), rank=16, reference=None)
    whole, packed = (make_plan(replace(lora, bits=bits)).roles[0].parts for bits in (None, "4bit"))
    policy = lora.policy
    assert whole["weights"] - packed["weights"] == 4 * policy.packable - policy.packed("4bit")
    assert whole["optimizer"] == packed["optimizer"] == 8 * policy.adapter(16)


def test_a_matrix_at_a_time_is_made_whole() -> None:
    plan = make_plan(replace(two_billion(), rank=16, reference=None, bits="4bit"))
    parts = next(phase.parts for phase in plan.phases if phase.name == "update")
    assert parts["weights as products read them"] == 6 * 2048 * 16384  # float32, then bfloat16


def test_reward_models_in_fewer_bits_are_a_change_that_may_fit() -> None:
    setup = seven_billion()
    change = quantized_judges(setup)
    assert change is not None and change.set == ("reward.models.0.quantize=8bit",)
    saved = make_plan(setup).phases[0].held - make_plan(change.setup).phases[0].held
    judge = setup.judges[0].shape
    assert saved == pytest.approx(2 * judge.packable - judge.packed("8bit"))
    assert quantized_judges(change.setup) is None


def test_the_weights_below_an_adapter_are_quantized_where_they_can_be() -> None:
    lora = replace(two_billion(), rank=16, reference=None)
    change = qlora(lora)
    assert change is not None and change.set == ("policy.quantize=4bit",) and change.setup.bits == "4bit"
    assert qlora(two_billion()) is None and qlora(change.setup) is None  # no adapter; done already
    shared = seven_billion(rank=16, reference=None)
    assert qlora(shared) is None  # ZeRO-3 cuts weights into shares
    assert zero3(replace(shared, bits="4bit", placement=replace(shared.placement, kind="zero2"))) is None


@needs("bitsandbytes")
def test_shards_of_quantized_weights_are_refused(tmp_path: Path) -> None:
    """By the plan, and by the run before anything loads."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "objective: reinforce\nrun: {name: x}\nreward: {functions: [{call: 'json:loads'}]}\ndata: {train: [{path: "
        "'json:loads'}]}\npolicy: {path: google/gemma-2-2b-it, lora: {}, quantize: 4bit}\n"
    )
    recipe = load_recipe(str(file))
    for name in ("zero3", "fsdp2"):
        with pytest.raises(UserError, match="ZeRO-3 and FSDP2 cut weights into shares"):
            plan_of(recipe, Options(gpus=8, memory="80GiB", accelerate=name), tmp_path)
    assert plan_of(recipe, Options(gpus=8, memory="80GiB", accelerate="zero2"), tmp_path).setup.bits == "4bit"
    small = plan_of(recipe, Options(gpus=8, memory="4GiB"), tmp_path)  # chosen here: ZeRO-3 is not tried
    assert not small.fits and small.setup.placement.kind == "zero2"
    for name in ("zero3", "fsdp2"):
        runtime = Runtime(accelerator=None, kind=cast(Any, name), device=torch.device("cpu"))
        with pytest.raises(UserError, match="ZeRO-3 and FSDP2 cut weights into shares"):
            refuse_what_needs_whole_weights(recipe, runtime)
