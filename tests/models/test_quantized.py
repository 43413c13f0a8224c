"""Quantized weights: close to the whole ones, computing exactly what they stand for, and never trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models import quantized
from rlhf.models.layout import plain_rows
from rlhf.models.load import LoraSpec, add_lora, export, frozen_copy, load_causal_lm
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.quantized import Bits, Quantization
from rlhf.models.reference import AdapterOffReference, FrozenReference
from rlhf.models.scratch import END_OF_TURN_ID, EOS_ID, build_causal_lm, build_config, build_reward_model
from rlhf.objectives.reinforce import Reinforce
from rlhf.programs.reference_cache import weights_digest
from rlhf.rewards.model import load_reward_model
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime import microbatches, training_state
from rlhf.runtime.updater import PolicyForward, Term, Updater
from rlhf.sampling.hf import HFSampler
from tests.models.test_lora import TOKENIZER
from tests.support import alone, fixed_rollout, needs, prepared

pytestmark = [
    needs("bitsandbytes"),
    # peft asks transformers 5 for an attribute by its old name while it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PLAIN, SPEC = StatsRequest(), LoraSpec(r=4, alpha=8.0)
BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])
FOUR = Quantization("4bit")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("quantized") / "base"
    config = build_config("gemma2", layers=2, hidden_size=128, heads=2, vocab_size=300)
    export(build_causal_lm(config, seed=0), TOKENIZER, folder, stop_ids=(EOS_ID, END_OF_TURN_ID), card="")
    return str(folder)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("quantized") / "judge"
    config = build_config("gemma2", layers=2, hidden_size=128, heads=2, vocab_size=300)
    export(build_reward_model(config, seed=1), TOKENIZER, folder, stop_ids=(), card="")
    return str(folder)


def whole(module: Any) -> Tensor:
    """What a quantized layer's weight stands for, in float32, by the library's own arithmetic."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if module.weight.dtype == torch.int8:
        return cast(Tensor, int8_vectorwise_dequant(module.weight.data, module.weight.SCB))
    return cast(Tensor, dequantize_4bit(module.weight.data, module.weight.quant_state)).float()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if getattr(m, "weight", None) is not None and is_packed(m)}


def is_packed(module: Any) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def spelled_out(model: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model with the weights that the quantized ones stand for."""
    packed = layers(model)
    plain = {name: value for name, value in model.state_dict().items() if name.rpartition(".weight")[0] not in packed}
    plain = {name: value for name, value in plain.items() if not name.endswith((".SCB", ".weight_format"))}
    return plain | {f"{name}.weight": whole(module) for name, module in packed.items()}


def logprobs(model: ScoredModel, batch: TokenBatch) -> Tensor:
    return token_stats(model, plain_rows(batch), PLAIN).logprobs


def adapted(lm: nn.Module, moved: bool = True) -> ScoredModel:
    model, generator = add_lora(lm, SPEC, seed=3), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ScoredModel(model)


def four(base: str) -> nn.Module:
    return load_causal_lm(base, quantize=FOUR)


# --- what is quantized -----------------------------------------------------------------------------------------------


@BITS
def test_linear_layers_alone_are_quantized(base: str, bits: Bits) -> None:
    model: Any = load_causal_lm(base, quantize=Quantization(bits))
    assert len(layers(model)) == 2 * 7  # of each layer: queries, keys, values, output, gate, up, down
    others = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers(model)}
    assert all(parameter.dtype == torch.float32 for parameter in others.values())
    assert any("embed" in name for name in others) and any("norm" in name for name in others)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = load_causal_lm(base)
    assert sum(map(quantized.weights, model.parameters())) == sum(p.numel() for p in plain.parameters())


@BITS
def test_a_score_head_stays_whole(judge: str, bits: Bits) -> None:
    model: Any = load_reward_model(judge, device="cpu", quantize=Quantization(bits)).model
    assert model.score.weight.dtype == torch.float32 and len(layers(model)) == 14


def test_a_head_that_would_be_quantized_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "KEPT", ("score",))
    with pytest.raises(UserError, match="output head lm_head would be quantized"):
        four(base)


def test_an_adapter_is_not_added_to_quantized_weights(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "final"
    export(add_lora(load_causal_lm(base), SPEC, 0), TOKENIZER, folder, stop_ids=(), card="")
    with pytest.raises(UserError, match="quantized weights take none in"):
        load_causal_lm(str(folder), quantize=FOUR)


# --- what it computes ------------------------------------------------------------------------------------------------


@BITS
def test_it_computes_what_its_weights_stand_for(base: str, bits: Bits) -> None:
    """In training and in evaluation alike. fp32 against fp32: sums in the same order."""
    model, plain = load_causal_lm(base, quantize=Quantization(bits)), load_causal_lm(base)
    plain.load_state_dict(spelled_out(model))
    rollout, expected = fixed_rollout(), logprobs(ScoredModel(plain), fixed_rollout())
    for training in (True, False):
        found = logprobs(ScoredModel(model.train(training)), rollout)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bits", "far"), [("4bit", 0.11), ("8bit", 0.01)])
def test_weights_are_near_the_whole_ones(base: str, bits: Bits, far: float) -> None:
    """Of N(0, 1) weights NF4 is off by .09 of their norm, int8 a row by less than .01: half a step of max/127."""
    model, plain = load_causal_lm(base, quantize=Quantization(bits)), dict(load_causal_lm(base).named_modules())
    for name, module in layers(model).items():
        expected = cast(Tensor, plain[name].weight).detach()
        assert 0.5 * far < float((whole(module) - expected).norm() / expected.norm()) < far


@pytest.mark.parametrize(("bits", "alike", "far"), [("4bit", 0.95, 1.0), ("8bit", 0.9995, 0.06)])
def test_scores_are_near_the_whole_models(judge: str, bits: Bits, alike: float, far: float) -> None:
    """64 random texts, random weights. Seen: correlations .979 and .9999, largest errors .70 and .037 standard
    deviations of the scores. The canary has looked at it too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (64,), generator=generator).tolist()
    texts = [TOKENIZER.decode(torch.randint(6, 262, (length,), generator=generator).tolist()) for length in lengths]
    prompts = [Prompt(row_id=i, text="The film") for i in range(len(texts))]
    scores = load_reward_model(judge, device="cpu").score_texts(prompts, texts)
    found = load_reward_model(judge, device="cpu", quantize=Quantization(bits)).score_texts(prompts, texts)
    assert 0 < float((found - scores).abs().max()) < far * float(scores.std())
    assert float(torch.corrcoef(torch.stack([found, scores]))[0, 1]) > alike


@BITS
def test_a_copy_computes_the_same(base: str, bits: Bits) -> None:
    model = load_causal_lm(base, quantize=Quantization(bits))
    expected = logprobs(ScoredModel(model), fixed_rollout())
    assert torch.equal(logprobs(ScoredModel(copy.deepcopy(model)), fixed_rollout()), expected)


def test_half_precision_computes_in_half_precision(base: str) -> None:
    """Two roundings to 8 bits of mantissa of numbers of order 1, through two layers."""
    rollout, low = fixed_rollout(), torch.bfloat16
    for bits in ("4bit", "8bit"):
        model = load_causal_lm(base, quantize=Quantization(cast(Bits, bits), low))
        exact = load_causal_lm(base, quantize=Quantization(cast(Bits, bits)))
        found = logprobs(ScoredModel(model, compute_dtype=low), rollout)
        torch.testing.assert_close(found, logprobs(ScoredModel(exact), rollout), atol=0.2, rtol=0)
        assert not torch.equal(found, logprobs(ScoredModel(exact), rollout))


# --- an adapter on it ------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_is_the_reference_to_the_last_bit(base: str) -> None:
    model = adapted(four(base), moved=False)
    rollout = fixed_rollout()
    reference = AdapterOffReference(model, model).stats(plain_rows(rollout), PLAIN).logprobs
    assert torch.equal(logprobs(model, rollout), reference)
    assert torch.equal(reference, logprobs(ScoredModel(four(base)), rollout))


def test_an_adapters_gradient_is_that_on_the_spelled_out_weights(base: str) -> None:
    """The same loss through plain LoRA on what the quantized weights stand for; ≤ 1e-5 of the largest entry."""
    quantized_base = four(base)
    plain = load_causal_lm(base)
    plain.load_state_dict(spelled_out(quantized_base))
    rollout = fixed_rollout()
    gradients = []
    for model in (adapted(quantized_base), adapted(plain)):
        (logprobs(model, rollout) * rollout.completion_mask).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    found, expected = gradients
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    size = max(float(value.abs().max()) for value in expected.values() if value is not None)
    for name, value in expected.items():
        assert value is not None and float((found[name] - value).abs().max()) <= 1e-5 * size, name


def test_an_adapters_gradient_is_a_difference_of_losses(base: str) -> None:
    """Along a random direction, central differences in float32: 1e-2 of the slope."""
    model, rollout = adapted(four(base)), fixed_rollout()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        return (logprobs(model, rollout).double() * rollout.completion_mask).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(parameter.shape, generator=generator) for parameter in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, direction, strict=True) if p.grad is not None)
    ends, far = [], 1e-3
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, way in zip(trained, direction, strict=True):
                parameter.add_(sign * far * way)
            ends.append(float(loss()))
            for parameter, way in zip(trained, direction, strict=True):
                parameter.sub_(sign * far * way)
    assert (ends[0] - ends[1]) / (2 * far) == pytest.approx(slope, rel=1e-2)


def test_completions_are_of_the_policy_that_is_scored(base: str) -> None:
    """The decode loop in evaluation, log π in training mode. fp32: a cache changes the shapes of products."""
    model = adapted(four(base)).train()
    sampler = HFSampler(tokenizer=TOKENIZER, samples_per_prompt=4, max_new_tokens=10, stop_ids=(EOS_ID,), seed=3)
    rollout = sampler.sample(model.causal_lm, [Prompt(row_id=0, text="The film")], [0], step=1)
    assert rollout.rollout_logprobs is not None
    assert float((logprobs(model, rollout).detach() - rollout.rollout_logprobs).abs().max()) <= 1e-5


def test_updates_move_the_adapter_and_nothing_else(base: str) -> None:
    model = adapted(four(base), moved=False)
    reference = AdapterOffReference(model, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    trainer = Updater(alone(), model, optimizer, lambda step: 1e-2, PolicyForward(reference), 100, None)
    objective = Reinforce(beta=0.3)
    for step in (1, 2):
        rollout = fixed_rollout(seed=step)
        known = microbatches.score(rollout, lambda batch: reference.stats(plain_rows(batch), PLAIN), 100)
        rollout = replace(rollout, ref_logprobs=known.logprobs, rollout_logprobs=known.logprobs)
        assert trainer.step([Term(objective=objective, batch=prepared(rollout, objective))], step).applied
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert set(training_state.collect(alone(), model, optimizer)["model"]) == moved  # the base is in no checkpoint


def test_a_frozen_copy_shares_the_quantized_weights(base: str) -> None:
    """What step limits compare with: the adapter is copied, the weights below it are not."""
    model = adapted(four(base))
    other = ScoredModel(frozen_copy(model.causal_lm))
    rollout = fixed_rollout()
    assert torch.equal(logprobs(other, rollout), logprobs(model, rollout))
    own = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    packed = [module.weight for module in layers(other).values()]
    assert packed and all(id(weight) in own for weight in packed)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1.0)
    assert not torch.equal(logprobs(other, rollout), logprobs(model, rollout))


def test_the_exported_folder_is_the_adapter_alone(base: str, tmp_path: Path) -> None:
    model, folder = adapted(four(base)), tmp_path / "final"
    export(model.causal_lm, TOKENIZER, folder, stop_ids=(EOS_ID,), card="")
    names = {path.name for path in folder.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names and "config.json" not in names
    again = load_causal_lm(str(folder))  # on the whole weights of its base
    assert not torch.allclose(
        logprobs(ScoredModel(again), fixed_rollout()), logprobs(model, fixed_rollout()), atol=1e-3
    )


# --- what it is known by ---------------------------------------------------------------------------------------------


@BITS
def test_a_quantized_reference_has_a_digest_of_its_own(base: str, bits: Bits) -> None:
    """Down to the figures that its integers are read with."""
    model = load_causal_lm(base, quantize=Quantization(bits))
    known = weights_digest(model, torch.float32)
    assert known == weights_digest(load_causal_lm(base, quantize=Quantization(bits)), torch.float32)
    assert known != weights_digest(load_causal_lm(base), torch.float32)
    weight: Any = next(iter(layers(model).values())).weight
    (weight.SCB if bits == "8bit" else weight.quant_state.state2.absmax).mul_(2)
    assert weights_digest(model, torch.float32) != known


@BITS
def test_a_quantized_reference_can_be_asked_for_its_distribution(base: str, bits: Bits) -> None:
    reference = FrozenReference(ScoredModel(load_causal_lm(base, quantize=Quantization(bits))))
    policy = ScoredModel(load_causal_lm(base))
    rows = plain_rows(fixed_rollout())
    request = StatsRequest(reference=True)
    kl = token_stats(policy, rows, request, reference.states(rows)).kl
    assert kl is not None and 0 < float(kl.detach().max()) < 0.5
