from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.scratch import (
    FAMILIES,
    PAD_ID,
    SPECIAL_TOKENS,
    STOP_IDS,
    build_causal_lm,
    build_config,
    build_reward_model,
    train_tokenizer,
)

TEXTS = ["Dear teacher, thank you for the science fair.", "Happy to help.", "It is good in many ways."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 5, 300)


def config(family: str, **changes: Any) -> Any:
    return build_config(family, **{"layers": 3, "hidden_size": 32, "heads": 4, "vocab_size": 300, **changes})


def test_special_tokens_have_fixed_ids(tokenizer: Any) -> None:
    assert tuple(tokenizer.convert_ids_to_tokens(range(6))) == SPECIAL_TOKENS
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 300
    assert tokenizer.encode("a")[0] == 2
    assert 2 not in tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "tab\tline\r\n\n", "▁ é e\u0301 中文 😀\u200d🔥", "\x00\x7f\ufeff", "don't"]
)
def test_every_text_decodes_to_itself(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id not in ids


def test_the_tokenizer_is_a_function_of_its_texts(tokenizer: Any) -> None:
    assert train_tokenizer(iter(TEXTS * 5), 300).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(UserError, match=r"262 ids are taken.*policy\.scratch\.vocab_size"):
        train_tokenizer(TEXTS, 262)


def test_the_template_has_gemmas_turns(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yo\n"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos><start_of_turn>user\n hi <end_of_turn>\n<start_of_turn>model\nyo\n<end_of_turn>\n"
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\n hi <end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_the_same(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build_causal_lm(config(family), seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    ids = loaded_tokenizer("Happy to help.", return_tensors="pt").input_ids
    assert ids.tolist() == [tokenizer.encode("Happy to help.")]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == list(STOP_IDS)
    assert loaded.generation_config.pad_token_id == PAD_ID


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_a_function_of_the_seed_and_nothing_else(family: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_causal_lm(config(family), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = build_causal_lm(config(family), seed=1).state_dict()
    other = build_causal_lm(config(family), seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_of_unit_scale_tied_and_fp32(family: str) -> None:
    model: Any = build_causal_lm(config(family, hidden_size=64), seed=0)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    logits = model(torch.arange(6, 106).view(2, 50)).logits
    assert 0.7 < logits.std().item() < 1.5  # 1 by construction, a little more for the tied token itself


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4"])
def test_windows_alternate_and_the_last_layer_sees_everything(family: str) -> None:
    for layers in (1, 4, 5):
        kinds = config(family, layers=layers).layer_types
        assert kinds[-1] == "full_attention"
        assert all(first != second for first, second in pairwise(kinds))


def test_a_window_hides_what_is_far() -> None:
    model: Any = build_causal_lm(config("gemma3", layers=2, sliding_window=4), seed=0)
    ids = torch.arange(10, 30).view(1, 20)
    changed = ids.clone()
    changed[0, 0] = 99
    states = [model.model(each, output_hidden_states=True).hidden_states[1] for each in (ids, changed)]
    moved = (states[0] - states[1]).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [True] * 4 + [False] * 16  # the first, windowed layer reaches three tokens back


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_reward_models_read_the_last_real_token(family: str, tmp_path: Path) -> None:
    plain = config(family, hidden_size=256, heads=4)
    model: Any = build_reward_model(plain, seed=3)
    assert model.score.bias is None
    assert model.score.weight.shape == (1, 256)
    assert model.score.weight.std().item() == pytest.approx(257**-0.5, rel=0.15)  # 256 draws: 4.4 % standard error
    assert plain.num_labels == 2  # the caller's config is left alone
    ids = torch.tensor([[7, 8, 9, PAD_ID, PAD_ID]])
    padded = model(ids, attention_mask=(ids != PAD_ID).long()).logits
    assert padded.shape == (1, 1)
    assert padded.item() == pytest.approx(model(ids[:, :3]).logits.item(), abs=1e-5)  # fp32, another width
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded(ids[:, :3]).logits.item() == pytest.approx(model(ids[:, :3]).logits.item(), abs=1e-6)


def test_gemma_4_cannot_score() -> None:
    with pytest.raises(UserError, match=r"gemma4_text.*policy\.scratch\.family"):
        build_reward_model(config("gemma4"), seed=0)


def test_shapes_that_cannot_be_built() -> None:
    with pytest.raises(UserError, match="'gemma9' is not known"):
        config("gemma9")
    with pytest.raises(UserError, match=r"hidden_size 30 over 4 heads.*policy\.scratch\.hidden_size"):
        config("gemma", hidden_size=30)
