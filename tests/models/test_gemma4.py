"""Gemma 4: the text model of a checkpoint that also sees, by plain paths, scored as transformers computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models import masks
from rlhf.models.chat import render_completion, render_prompt, stop_ids, supports_system, turn_end
from rlhf.models.layout import plain_rows
from rlhf.models.load import LoraSpec, add_lora, export, keep_activations, load_causal_lm, load_tokenizer
from rlhf.models.load import weightless_causal_lm as weightless
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.quantized import Quantization
from rlhf.planning.shapes import read_shape
from rlhf.rollout import Prompt, TokenBatch, Turn
from rlhf.sampling.hf import HFSampler
from rlhf.sampling.loop import DecodeLoop
from tests import gemma4
from tests.support import fixed_rollout, needs

PLAIN = StatsRequest()
KIND = pytest.mark.parametrize("kind", list(gemma4.KINDS))
# peft asks transformers 5 for an attribute by its old name while it wraps a model
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("gemma4")
    for kind in gemma4.KINDS:
        gemma4.write(place / kind, kind)
    return {kind: place / kind for kind in gemma4.KINDS}


def logprobs(lm: Any, batch: TokenBatch) -> Tensor:
    return token_stats(ScoredModel(lm), plain_rows(batch), PLAIN).logprobs.detach()


@torch.no_grad()
def bare(lm: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π of a completion by the model's own forward over one row without padding."""
    logits = lm(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return cast(Tensor, logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])


# --- loading ---------------------------------------------------------------------------------------------------------


@KIND
def test_the_text_model_alone_is_loaded(kind: str, folders: dict[str, Path]) -> None:
    """It says what the whole model says of text, and holds nothing that sees; the layers' scalars are the file's."""
    text: Any = load_causal_lm(str(folders[kind]))
    assert type(text).__name__ == "Gemma4ForCausalLM" and not any("vision" in n for n, _ in text.named_parameters())
    whole, ids = gemma4.seeing(kind, vocab_size=len(gemma4.tokenizer())), torch.arange(6, 30)[None]
    assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert float(text.model.layers[0].layer_scalar) == pytest.approx(0.9)


@KIND
def test_what_is_exported_is_a_text_model_that_loads(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers would write the names that it read, under which its text class finds nothing."""
    model, rollout = load_causal_lm(str(folders[kind])), fixed_rollout()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    known = logprobs(model, rollout)
    export(model, gemma4.tokenizer(), tmp_path / "final", stop_ids=(1,), card="")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "gemma4_text"
    assert not any("language_model" in name for name in load_file(tmp_path / "final" / "model.safetensors"))
    assert torch.equal(logprobs(load_causal_lm(str(tmp_path / "final")), rollout), known)


@pytest.mark.parametrize("old", [True, False], ids=["language_model.model", "model.language_model"])
def test_gemma_3s_text_model_alone_is_loaded(tmp_path: Path, old: bool) -> None:
    """Under the names of its first checkpoints and under today's."""
    text = dict(
        **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8, "initializer_range": 0.2},
    )
    seeing = {key: gemma4.SEEING[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    vision = {**seeing, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    whole: Any = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    whole.eval().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    plain = {
        name.removeprefix("model.").replace("language_model.", "language_model.model."): v for name, v in names.items()
    }
    if old:
        save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text_model: Any = load_causal_lm(str(tmp_path))
    ids = torch.arange(6, 30)[None]
    assert type(text_model).__name__ == "Gemma3ForCausalLM" and masks.known(text_model)
    torch.testing.assert_close(text_model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_variants_that_are_not_read_right_are_refused(tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    for more, words in ((experts, "a mixture of experts"), ({"use_bidirectional_attention": "all"}, "no log π")):
        config = gemma4.config("large", **more)
        config.save_pretrained(tmp_path)
        for read in (load_causal_lm, weightless):
            with pytest.raises(UserError, match=words):
                read(str(tmp_path))
        with pytest.raises(UserError, match=words):
            read_shape(config, name="x", source="config.json")


# --- computing -------------------------------------------------------------------------------------------------------


@KIND
def test_fast_paths_leave_it_alone(kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that layers share, and heads of two widths, are not what the decode loop and shared rows know."""
    model = load_causal_lm(str(folders[kind]))
    assert not masks.known(model)
    monkeypatch.setattr(DecodeLoop, "run", lambda *_: pytest.fail("not for this model"))
    sampler = HFSampler(tokenizer=gemma4.tokenizer(), samples_per_prompt=2, max_new_tokens=2)
    sampler.sample(model, [Prompt(row_id=0, text="hello")], [0], step=1)


@KIND
def test_padded_rows_have_the_logprobs_of_bare_rows(kind: str, folders: dict[str, Path]) -> None:
    """Windows of 8 in rows of up to 16, layers that share keys: the mask and the positions reach all of them."""
    lm: Any = load_causal_lm(str(folders[kind]))
    prompts = [[2, 7, 8, 9, 10, 11, 12, 13, 14], [2, 20, 21], [2, 33, 34, 35, 36]]
    completions = [[50, 51, 52, 1], [60, 61, 62, 63, 64, 65, 1], [70, 1]]
    found = logprobs(lm, TokenBatch.from_ids(prompts, completions))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = bare(load_causal_lm(str(folders[kind])), prompt, completion)
        torch.testing.assert_close(found[row, : len(completion)], expected, atol=2e-5, rtol=0)


@KIND
def test_completions_are_of_the_policy_that_is_scored(kind: str, folders: dict[str, Path]) -> None:
    """Decoded far beyond the window, with a cache that layers share."""
    lm = load_causal_lm(str(folders[kind]))
    tokenizer = load_tokenizer(str(folders[kind]))
    sampler = HFSampler(tokenizer=tokenizer, samples_per_prompt=4, max_new_tokens=24, seed=3)
    prompts = [Prompt(row_id=0, text="hello there"), Prompt(row_id=1, turns=(Turn(role="user", content="tell me"),))]
    rollout = sampler.sample(lm, prompts, [0, 1], step=1)
    assert rollout.rollout_logprobs is not None and int(rollout.completion_mask.sum(1).max()) == 24
    gap = (logprobs(lm, rollout) - rollout.rollout_logprobs).abs()[rollout.completion_mask].max()
    assert float(gap) <= 5e-5


@KIND
def test_layers_computed_again_have_the_same_gradient(kind: str, folders: dict[str, Path]) -> None:
    """Keys that a layer hands to a later one are recomputed with it."""
    gradients = []
    for how in ("keep", "recompute"):
        lm = load_causal_lm(str(folders[kind])).train()
        keep_activations(lm, cast(Any, how))
        rollout = fixed_rollout()
        found = token_stats(ScoredModel(lm), plain_rows(rollout), PLAIN).logprobs
        (found * rollout.completion_mask).sum().backward()
        gradients.append({name: p.grad for name, p in lm.named_parameters()})
    kept, again = gradients
    size = max(float(value.abs().max()) for value in kept.values() if value is not None)
    for name, value in kept.items():
        assert value is not None and again[name] is not None, name
        assert float((value - again[name]).abs().max()) <= 1e-6 * size, name


@quiet
@KIND
def test_an_adapter_sits_on_every_linear_layer_that_is_planned(kind: str, folders: dict[str, Path]) -> None:
    base = load_causal_lm(str(folders[kind]))
    shape = read_shape(cast(Any, base).config, name="x", source="config.json")
    model = add_lora(base, LoraSpec(4, 8.0), 0)
    assert shape.adapter(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@needs("bitsandbytes")
@KIND
def test_quantized_weights_are_those_that_are_planned(kind: str, folders: dict[str, Path]) -> None:
    """log π moves a little; the table of per-layer embeddings stays whole."""
    plain = load_causal_lm(str(folders[kind]))
    model = load_causal_lm(str(folders[kind]), quantize=Quantization("8bit"))
    packed = sum(p.numel() for p in model.parameters() if not p.is_floating_point())
    assert packed == read_shape(cast(Any, plain).config, name="x", source="config.json").packable
    known = logprobs(plain, fixed_rollout())
    gap = (logprobs(model, fixed_rollout()) - known).abs().max()
    assert 0 < float(gap) < 0.1 * float(known.abs().max())


# --- counting --------------------------------------------------------------------------------------------------------


@KIND
def test_its_weights_are_counted_without_what_sees(kind: str, folders: dict[str, Path]) -> None:
    loaded: Any = load_causal_lm(str(folders[kind]))
    count = sum(parameter.numel() for parameter in loaded.parameters())
    assert sum(p.numel() for p in weightless(str(folders[kind])).parameters()) == count
    for config in (gemma4.config(kind, len(gemma4.tokenizer())), loaded.config):
        assert read_shape(config, name="x", source="config.json").parameters == count


def test_heads_that_differ_between_layers_are_counted_by_their_mean() -> None:
    """Three layers of 16 and three of 32: 24. Keys: small 1 head in all, 4 of 6 layers with keys of their own; large 2
    heads of 16 and 1 of 32, 32 numbers in each layer, which is one and a third head of 24, taken as two."""
    small, large = (read_shape(gemma4.config(kind), name="x", source="config.json") for kind in ("small", "large"))
    assert (small.head_dim, small.kv_heads, small.kv_layers, small.row) == (24, 1, 4, 4 * 24)
    assert (large.head_dim, large.kv_heads, large.kv_layers, large.row) == (24, 2, 6, 6 * 48)


# --- turns -----------------------------------------------------------------------------------------------------------


def test_its_turns_end_in_their_own_token(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(folders["small"]))
    end = tokenizer.convert_tokens_to_ids("<turn|>")
    assert turn_end(tokenizer) == end and supports_system(tokenizer)
    assert set(stop_ids(tokenizer, cast(Any, load_causal_lm(str(folders["small"]))).generation_config)) == {1, end}
    prompt = Prompt(row_id=0, turns=(Turn(role="system", content="be brief"), Turn(role="user", content="hello")))
    ids = render_prompt(tokenizer, prompt) + render_completion(tokenizer, prompt, "well")
    text = "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\nwell<turn|>"
    assert tokenizer.decode(ids) == text
