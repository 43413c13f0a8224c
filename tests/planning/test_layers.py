"""What layers are said to keep for backward, against the tensors that autograd really saves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from rlhf.models import masks
from rlhf.models.scratch import Family, build_causal_lm, build_config
from rlhf.planning.layers import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    Forward,
    Regime,
    activations,
    kept_per_token,
    mask_building,
)
from rlhf.planning.shapes import read_shape

ROWS, WIDTH = 2, 40  # 80 tokens: no weight has such a side


def saved_by_a_layer(model: Any, low: bool) -> int:
    """Bytes that the second of two layers adds to what is saved; weights and their casts left out."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, WIDTH))
    positions = torch.arange(WIDTH)[None].expand(ROWS, -1)
    mask = masks.masks(model, *masks.tree(torch.zeros(ROWS, WIDTH, dtype=torch.long), positions))
    weights = {parameter.shape for parameter in model.parameters() if parameter.dim() == 2}
    kept: dict[int, torch.Tensor] = {}
    ends: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        of_a_weight = tensor.dim() == 2 and bool({tensor.shape, tensor.t().shape} & weights)
        if not of_a_weight:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: ends.append(len(kept)))
    autocast = torch.autocast("cpu", torch.bfloat16) if low else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in list(kept.values())[ends[0] : ends[1]])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize(("regime", "name"), [(FLOAT32, "float32"), (AUTOCAST, "autocast"), (BFLOAT16, "engine")])
def test_a_layer_keeps_what_autograd_saves(family: Family, regime: Regime, name: str) -> None:
    config = build_config(family, layers=2, hidden_size=96, heads=4, vocab_size=300, intermediate_size=352, kv_heads=2)
    shape, model = read_shape(config, name="x", source="recipe"), build_causal_lm(config, 0)
    seen = saved_by_a_layer(model.to(torch.bfloat16) if name == "engine" else model, name == "autocast")
    told = kept_per_token(shape, regime, WIDTH, True) * ROWS * WIDTH
    assert told == pytest.approx(seen, rel=0.05)


def test_a_layer_by_hand() -> None:
    """Gemma 2B in float32, causal rows: 4 bytes of 2 · 3 · 2,048 around norms, 2 · 2,048 + 2 · 256 of attention,
    4 · 16,384 of the MLP, and the sums of 8 heads."""
    from tests.planning.test_shapes import shape

    found = kept_per_token(shape("google/gemma-2b"), FLOAT32, 1_000, False)
    assert found == 4 * (6 * 2_048 + 2 * 2_048 + 2 * 256 + 4 * 16_384 + 8)


def test_recomputing_keeps_the_inputs_and_one_layer() -> None:
    from tests.planning.test_shapes import shape

    gemma, forward = shape("google/gemma-2b"), Forward(4, 512, 1024)
    kept, again = (activations(gemma, FLOAT32, forward, how) for how in ("keep", "recompute"))  # type: ignore[arg-type]
    layer = kept_per_token(gemma, FLOAT32, 512, True)
    assert kept - again == forward.tokens * (17 * layer - 18 * 4 * 2_048)
    assert activations(gemma, FLOAT32, forward, "offload") < again


def test_masks_are_quadratic_in_a_row() -> None:
    assert mask_building(Forward(1, 4096, 1, shared=True)) == 12 * 4096**2
    assert mask_building(Forward(4, 1024, 1)) == 0
