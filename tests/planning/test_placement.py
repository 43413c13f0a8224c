"""Launch configurations, and the bytes of the trained model under each, by hand: 800 weights, 4 processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.locate import accelerate_config_file, shipped_accelerate_configs
from rlhf.planning.placement import BUCKET, Placement, Units, held, read_placement

FOUR = Placement(kind="zero2", processes=4, bucket=10, live=300)


def test_one_process_holds_sixteen_bytes_a_weight() -> None:
    found = held(Placement(kind="single"), 0, 800, 100, low=True)
    assert (found.weights, found.optimizer, found.gradients) == (4 * 800, 8 * 800, 4 * 800)
    assert found.stepping == 4 * 800  # on a GPU AdamW takes all square roots at once, on a CPU a tensor's at a time
    assert held(Placement(kind="single", cpu=True), 0, 800, 100, low=False).stepping == 8 * 100


def test_replicas_hold_their_gradients_twice() -> None:
    assert held(Placement(kind="ddp", processes=4), 0, 800, 100, low=True).buckets == 4 * 800


@pytest.mark.parametrize(
    ("kind", "weights", "optimizer", "gradients"),
    [
        ("zero1", 2 * 800, 12 * 200, 2 * 800),
        ("zero2", 2 * 800, 12 * 200, 2 * 200),
        ("zero3", 2 * 200, 12 * 200, 2 * 200),
    ],
)
def test_zero_in_bfloat16(kind: str, weights: int, optimizer: int, gradients: int) -> None:
    """Weights and gradients in bfloat16; masters and two moments in float32, shared out."""
    found = held(FOUR.at(kind), 0, 800, 100, low=True)  # type: ignore[arg-type]
    assert (found.weights, found.optimizer, found.gradients) == (weights, optimizer, gradients)
    assert found.buckets == 2 * 10
    assert (found.gathered, found.whole) == ((2 * 300, 2 * 800) if kind == "zero3" else (0, 0))


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_zero_in_float32_has_masters_of_its_own(kind: str) -> None:
    assert held(FOUR.at(kind), 0, 800, 100, low=False).optimizer == (4 + 8) * 200  # type: ignore[arg-type]


def test_layers_are_gathered_with_what_is_in_none() -> None:
    """Two layers of 100 and the 300 beside them; None = nothing is in a layer."""
    units = Units(layer=100, rest=300)
    assert held(FOUR.at("zero3"), 0, 800, 100, low=True, units=units).by_layer == 2 * 500
    assert held(FOUR.at("zero3"), 0, 800, 100, low=True).by_layer == 2 * 800
    assert held(FOUR.at("zero2"), 0, 800, 100, low=True, units=units).by_layer == 0


def test_fsdp2_keeps_float32_shares_and_gathers_two_layers() -> None:
    """800 weights, 100 in each layer and 300 beside them."""
    found = held(FOUR.at("fsdp2"), 0, 800, 100, low=True, units=Units(layer=100, rest=300))
    assert (found.weights, found.optimizer, found.gradients) == (4 * 200, 8 * 200, 4 * 200)
    assert (found.gathered, found.whole, found.by_layer) == (2 * 500, 2 * 800, 2 * 500)
    assert found.buckets == (2 + 4) * 100  # a layer's gradient, and its float32 copy on the way


def test_frozen_weights_have_neither_gradient_nor_moments() -> None:
    found = held(FOUR, 800, 40, 10, low=True)
    assert (found.weights, found.optimizer, found.gradients) == (2 * 840, 12 * 10, 2 * 10)


def test_what_is_offloaded_lies_on_the_host() -> None:
    found = held(Placement(kind="zero2", processes=4, offload_optimizer=True, bucket=0), 0, 800, 100, low=True)
    assert (found.optimizer, found.gradients, found.stepping, found.host) == (0, 0, 0, 14 * 200)


@pytest.mark.parametrize("name", shipped_accelerate_configs())
def test_every_shipped_configuration_is_understood(name: str) -> None:
    gpus = 1 if name == "single_gpu" else 8
    found = read_placement(accelerate_config_file(name), gpus)
    kinds = {"cpu": "single", "single_gpu": "single", "cpu_2ranks": "ddp", "cpu_2nodes": "ddp"}
    kinds |= {"zero3_offload": "zero3", "multi_node_zero3": "zero3"}
    assert found.kind == kinds.get(name, name.removeprefix("cpu_"))
    assert found.processes == (gpus if not found.cpu else 1 if name == "cpu" else 2)
    assert found.bucket == BUCKET


def test_a_deepspeed_file_is_followed(tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 5e6, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    found = read_placement(file, 8)
    assert (found.kind, found.bucket, found.offload_optimizer) == ("zero3", 5_000_000, True)
    assert "ZeRO-3, optimizer in host memory" in found.said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: FSDP", "only fsdp_version 2"),
        ("distributed_type: MEGATRON_LM", "MEGATRON_LM is not planned for"),
        ("distributed_type: 'NO'", "starts one process, and there are 8 GPUs"),
        ("- a list", "not a configuration"),
    ],
)
def test_others_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_placement(file, 8)
