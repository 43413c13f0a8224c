"""Counts of public models, read off configurations alone."""

from __future__ import annotations

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.load import LoraSpec, add_lora
from rlhf.models.scratch import build_causal_lm, build_config
from rlhf.planning.families import known_config, known_names
from rlhf.planning.shapes import Shape, read_shape

# What the published checkpoints hold. Gemma 2B by hand: embedding 256,000 · 2,048 = 524,288,000; a layer
# 2,048 · (2,048 + 2 · 256 + 2,048) + 3 · 2,048 · 16,384 + 2 · 2,048 = 110,104,576, times 18; a last norm of 2,048.
PUBLISHED = {
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b-it": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-4-31B-it": 30_697_345_280,
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
}


def shape(name: str, **more: str) -> Shape:
    return read_shape(known_config(name), name=name, source="table", **more)


@pytest.mark.parametrize(("name", "weights"), PUBLISHED.items())
def test_public_models_have_the_weights_that_were_published(name: str, weights: int) -> None:
    assert shape(name).parameters == weights


def test_gemma_4_by_hand() -> None:
    """E4B: tables that give every layer its own embedding of a token, and 18 of 42 layers without keys of their own."""
    found = shape("google/gemma-4-E4B-it")
    tables = 262_144 * 42 * 256
    assert found.parameters == 7_463_013_376
    assert round((found.parameters - tables) / 1e9, 1) == 4.6 and found.kv_layers == 24
    large = shape("google/gemma-4-31B")
    assert large.row == 60 * large.keys and large.softcap


def test_a_layer_by_hand() -> None:
    found = shape("google/gemma-2b")
    assert (found.layer, found.head, found.largest) == (110_104_576, 524_288_000, 2_048 * 16_384)
    assert (found.queries, found.keys, found.trunk) == (2_048, 256, 18 * 110_104_576)
    assert 18 * found.layer + found.head + 2_048 == found.parameters
    assert not found.own_head and found.stored_bytes == 2


def test_a_scalar_head_takes_the_place_of_an_untied_vocabulary() -> None:
    pythia, gemma = shape("EleutherAI/pythia-1b-deduped"), shape("google/gemma-2-27b")
    assert pythia.as_scalar().parameters == pythia.parameters - 50_304 * 2_048 + 2_048
    assert gemma.as_scalar().parameters == gemma.parameters + 4_608
    assert gemma.as_scalar().as_scalar() == gemma.as_scalar()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_as_large_as_peft_makes_it() -> None:
    config = build_config("gemma", layers=2, hidden_size=64, heads=4, vocab_size=300)
    found = read_shape(config, name="x", source="recipe")
    model = add_lora(build_causal_lm(config, 0), LoraSpec(8, 16.0), 0)
    assert found.adapter(8) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    queries = read_shape(config, name="x", source="recipe", targets=("q_proj",))
    assert queries.adapter(8) == 2 * 8 * (64 + 64)


def test_the_kernel_is_the_models_own_choice_unless_the_recipe_has_one() -> None:
    assert shape("google/gemma-7b").attention == "sdpa" and shape("google/gemma-2-9b").attention == "eager"
    assert shape("google/gemma-7b", attention="eager").attention == "eager"
    assert shape("google/gemma-7b", attention="flash_attention_2").attention == "flash"


def test_reading_a_shape_allocates_nothing_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    shape("google/gemma-2-27b")
    assert torch.equal(state, torch.get_rng_state())


def test_a_name_that_is_not_in_the_table_has_no_configuration() -> None:
    assert known_config("someone/else") is None and known_config("google/gemma-2-9b-pt") is not None
    assert {"google/gemma-2b", "google/gemma-3-4b"} <= set(known_names())


def test_a_model_that_writes_nothing_is_refused_by_name() -> None:
    from transformers import ViTConfig

    with pytest.raises(UserError, match="my-model: no causal language model"):
        read_shape(ViTConfig(), name="my-model", source="config.json")
