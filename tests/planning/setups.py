"""Setups of public models that tests plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf.planning.placement import Placement
from rlhf.planning.setup import Judge, Machine, Setup, Step
from rlhf.planning.shapes import Shape
from tests.planning.test_shapes import shape

H100 = Machine(gpus=8, memory=80 * 2**30, card="h100")
STEP = Step(prompts=128, rows=4, prompt=512, completion=256, microbatch=16384)


def seven_billion(**changes: Any) -> Setup:
    """Gemma 7B, all weights trained, a copy of it as reference and a reward model of Gemma 2 27B, on eight GPUs."""
    policy = shape("google/gemma-7b")
    setup = Setup(
        program="policy",
        policy=policy,
        step=replace(STEP, activations="recompute"),
        placement=Placement(kind="zero3", processes=8),
        machine=H100,
        reference=policy,
        judges=(Judge(shape=shape("google/gemma-2-27b").as_scalar(), tokens=16384),),
    )
    return replace(setup, **changes)


def two_billion(**changes: Any) -> Setup:
    """Gemma 2B with itself as reference and a verifiable reward, on one GPU."""
    policy = shape("google/gemma-2b")
    setup = Setup(
        program="policy",
        policy=policy,
        step=replace(STEP, prompts=16),
        placement=Placement(kind="single"),
        machine=Machine(gpus=1, memory=80 * 2**30),
        reference=policy,
    )
    return replace(setup, **changes)


def small(shape: Shape, layers: int) -> Shape:
    """The same model with fewer layers."""
    return replace(shape, layers=layers, parameters=shape.parameters - (shape.layers - layers) * shape.layer)
