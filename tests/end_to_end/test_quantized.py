"""QLoRA and quantized judges through ``rlhf.train``: two steps of REINFORCE, resumed, sampled from, and refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.errors import ExitCode, UserError
from rlhf.models.load import export, load_tokenizer
from rlhf.models.scratch import build_config, build_reward_model
from rlhf.programs.run_folder import open_folder
from rlhf.programs.sample import Request, samples
from rlhf.recipe import rules_models
from tests.end_to_end.runs import LORA, Run, assert_sound, train
from tests.support import needs

QLORA = (*LORA, "policy.quantize=4bit")

# peft asks transformers 5 for an attribute by its old name while it wraps a model
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
bitsandbytes = needs("bitsandbytes")


@bitsandbytes
@quiet
@pytest.mark.parametrize(
    "settings",
    [(), ("kl.estimator=exact",), ("optim.kl_step_limit=1.0e-3",), ("batch.activations=recompute",)],
    ids=["k1", "exact", "limit", "recompute"],
)
def test_an_adapter_on_four_bits_trains(recipe: str, sft: Path, settings: tuple[str, ...]) -> None:
    """It begins at the reference to the last bit; ``final/`` and the checkpoints hold the adapter alone."""
    run = train(recipe, *QLORA, *settings)
    assert_sound(run, sft)
    files = {path.name for path in (run.path / "final").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    kept = load_file(run.path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert kept and all("lora_" in name and value.dtype == torch.float32 for name, value in kept.items())
    before = AutoModelForCausalLM.from_pretrained(sft).state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in run.weights.items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


@bitsandbytes
@quiet
def test_a_run_told_to_stop_goes_on_to_the_same_adapter(recipe: str) -> None:
    whole = train(recipe, *QLORA, name="whole")
    assert rlhf.train(recipe, "run.name=halved", *QLORA, "run.max_seconds=1.0e-9") == ExitCode.PREEMPTED
    halved = train(recipe, *QLORA, name="halved")
    assert [row["policy/loss"] for row in halved.metrics] == [row["policy/loss"] for row in whole.metrics]
    ends = [load_file(run.path / "final" / "adapter_model.safetensors") for run in (whole, halved)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[1][name], ends[0][name]) for name in ends[0])


@bitsandbytes
@quiet
def test_samples_are_of_the_policy_as_it_was_trained(recipe: str) -> None:
    """The adapter on quantized weights, beside those weights alone."""
    run = train(recipe, *QLORA, "optim.lr=1.0e-3")
    found = samples(open_folder(run.path), Request(prompts=("hello",), count=2), lambda text: None)
    assert len(found) == 2 and all(sample.start is not None and sample.run.tokens > 0 for sample in found)


@bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_reference_and_a_judge_in_fewer_bits(recipe: str, sft: Path, bits: str) -> None:
    """The policy does not begin at a rounded reference; a rounded judge's scores are near the whole one's."""
    _judge(sft)
    rewards = "reward={models: [{path: judge}], missing_eos_score: null}"
    plain = train(recipe, rewards, name="plain")
    run = train(recipe, rewards, f"reward.models.0.quantize={bits}", f"reference.quantize={bits}", name="rounded")
    assert run.metrics[0]["kl/reference"] != 0 == plain.metrics[0]["kl/reference"]
    scores = [each.metrics[0]["reward/score_mean"] for each in (plain, run)]
    assert scores[0] != scores[1] and scores[0] == pytest.approx(scores[1], abs=0.2 if bits == "4bit" else 0.02)


def _judge(sft: Path) -> None:
    tokenizer = load_tokenizer(str(sft))
    config = build_config("gemma", layers=1, hidden_size=64, heads=2, vocab_size=len(tokenizer))
    export(build_reward_model(config, seed=5), tokenizer, Path("judge"), stop_ids=(), card="")


def test_a_missing_library_is_said_before_anything_loads(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rules_models.find_spec
    monkeypatch.setattr(rules_models, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match=r"bitsandbytes is not installed; `pip install 'rlhf\[quantize\]'`"):
        rlhf.train(recipe, *QLORA)


@bitsandbytes
@quiet
def test_an_adapters_folder_is_refused(recipe: str) -> None:
    train(recipe, *LORA, name="first")
    with pytest.raises(UserError, match="is an adapter, and quantized weights take none in; `rlhf merge"):
        rlhf.train(recipe, "run.name=second", "policy.path=runs/first-reinforce/final", *QLORA)


@bitsandbytes
@quiet
def test_pairs_are_learned_from_below_four_bits(recipe: str) -> None:
    """Offline DPO: at the reference every margin is 0; log π_ref is the quantized weights', kept under their name."""
    pairs = "data.train.0.path=rlhf.data.quickstart:preferences"
    for name, settings in (("whole", LORA), ("packed", QLORA)):
        assert rlhf.train(recipe, "objective=dpo", pairs, f"run.name={name}", *settings) == ExitCode.DONE
        first, second = Run(Path("runs") / f"{name}-dpo").metrics
        assert first["policy/loss"] == pytest.approx(math.log(2), abs=1e-6) and second["policy/pair_margin"] != 0
    assert len(list(Path("runs").glob(".reference/*.safetensors"))) == 2
