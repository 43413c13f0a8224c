"""``rlhf merge``: folders in, a folder out that is the mean, and what cannot be averaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import ExitCode, UserError
from rlhf.models import load
from rlhf.models.load import LoraSpec, add_lora
from rlhf.models.scratch import build_causal_lm, build_config, build_reward_model
from rlhf.programs import merge
from tests.sampling.test_hf import TOKENIZER


def config(layers: int = 1) -> object:
    return build_config("gemma", layers=layers, hidden_size=32, heads=2, vocab_size=len(TOKENIZER))


@pytest.fixture
def policies(tmp_path: Path) -> list[Path]:
    """Three language models of one shape."""
    for seed in range(3):
        build_causal_lm(config(), seed).save_pretrained(tmp_path / f"{seed}")
        TOKENIZER.save_pretrained(tmp_path / f"{seed}")
    return [tmp_path / f"{seed}" for seed in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return found


def run(models: list[Path], out: Path, **settings: object) -> Path:
    defaults: dict[str, object] = {"weights": [], "base": None, "slerp": None}
    assert merge.main([str(path) for path in models], out, **{**defaults, **settings}) == ExitCode.DONE
    return out


def test_the_mean_of_policies(policies: list[Path], tmp_path: Path) -> None:
    out = run(policies, tmp_path / "new" / "mean", weights=[2.0, 1.0, 1.0])
    parts = [weights(path) for path in policies]
    for name, value in weights(out).items():
        torch.testing.assert_close(value, (2 * parts[0][name] + parts[1][name] + parts[2][name]) / 4)
    assert load.load_tokenizer(str(out)).get_vocab() == TOKENIZER.get_vocab()
    assert "2 × " in (out / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == ["mean"]  # nothing half-written beside it


def test_the_arc_between_two_policies_passes_through_both(policies: list[Path], tmp_path: Path) -> None:
    base = str(policies[2])
    for at, end in ((0.0, policies[0]), (1.0, policies[1])):
        out = run(policies[:2], tmp_path / f"arc{at}", slerp=at, base=base)
        expected = weights(end)
        for name, value in weights(out).items():
            torch.testing.assert_close(value, expected[name])


def test_reward_models_keep_their_mean_score(tmp_path: Path) -> None:
    """The head's bias-like ``reward_center`` is averaged with the weights."""
    for seed, centre in ((0, 1.0), (1, 4.0)):
        model = build_reward_model(config(), seed)
        model.config.reward_center = centre
        model.save_pretrained(tmp_path / f"{seed}")
        TOKENIZER.save_pretrained(tmp_path / f"{seed}")
        (tmp_path / f"{seed}" / "adapter").mkdir()  # of a LoRA run; a mean of models has none
    out = run([tmp_path / "0", tmp_path / "1"], tmp_path / "mean", weights=[3.0, 1.0])
    assert not (out / "adapter").exists()
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.reward_center == 1.75 and merged.config.num_labels == 1


def test_a_reward_model_without_a_mean_score_has_0(tmp_path: Path) -> None:
    for seed, centre in ((0, None), (1, 4.0)):
        model = build_reward_model(config(), seed)
        if centre is not None:
            model.config.reward_center = centre
        model.save_pretrained(tmp_path / f"{seed}")
        TOKENIZER.save_pretrained(tmp_path / f"{seed}")
    out = run([tmp_path / "0", tmp_path / "1"], tmp_path / "mean")
    assert AutoModelForSequenceClassification.from_pretrained(out).config.reward_center == 2.0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_an_adapter_becomes_a_whole_model(policies: list[Path], tmp_path: Path) -> None:
    model = add_lora(load.load_causal_lm(str(policies[0])), LoraSpec(4, 8, "all-linear"), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    load.export(model, TOKENIZER, tmp_path / "adapter", stop_ids=(1,), card="")
    out = run([tmp_path / "adapter"], tmp_path / "whole")
    assert not (out / "adapter_config.json").exists()
    expected = load.merged_state(model)
    for name, value in weights(out).items():
        torch.testing.assert_close(value, expected[name])
    with pytest.raises(UserError, match=r"adapter: is an adapter; first `rlhf merge"):
        run([policies[0], tmp_path / "adapter"], tmp_path / "mixed")


def test_what_cannot_be_averaged(policies: list[Path], tmp_path: Path) -> None:
    build_causal_lm(config(layers=2), 0).save_pretrained(tmp_path / "deep")
    TOKENIZER.save_pretrained(tmp_path / "deep")
    with pytest.raises(UserError, match="not the tensors of"):
        run([policies[0], tmp_path / "deep"], tmp_path / "out")
    with pytest.raises(UserError, match="is no model's folder"):
        run([policies[0], tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        run(policies, policies[0])
    with pytest.raises(UserError, match="is one model and no adapter"):
        run(policies[:1], tmp_path / "out")
    with pytest.raises(UserError, match="3 models"):
        run(policies, tmp_path / "out", weights=[1.0])
    with pytest.raises(UserError, match="--slerp and --base"):
        run(policies[:2], tmp_path / "out", slerp=0.5)
    tokenizer = json.loads((policies[1] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (policies[1] / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="has another vocabulary"):
        run(policies, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_written_once_and_read_once(policies: list[Path], tmp_path: Path) -> None:
    """A model that was loaded from bfloat16 is exported as its base was stored, and belongs to it; so does a folder of
    another program that holds the embeddings under the head's name once more, in several files."""
    model = AutoModelForCausalLM.from_pretrained(policies[0])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    TOKENIZER.save_pretrained(tmp_path / "bf16")
    trained = load.load_causal_lm(str(tmp_path / "bf16"))
    load.export(trained, TOKENIZER, tmp_path / "trained", stop_ids=(), card="")
    assert "lm_head.weight" not in names(tmp_path / "trained")
    twice = shutil.copytree(policies[0], tmp_path / "twice")
    state = {**load_file(twice / "model.safetensors"), "lm_head.weight": model.get_input_embeddings().weight.clone()}
    (twice / "model.safetensors").unlink()
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(where.values()):
        save_file(
            {n: state[n].contiguous() for n in state if where[n] == file}, twice / file, metadata={"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": where}
    (twice / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    out = run([twice, tmp_path / "trained"], tmp_path / "mean")
    assert "lm_head.weight" not in names(out)
    for name, value in weights(out).items():
        torch.testing.assert_close(value, state.get(name, value).float(), rtol=1e-2, atol=1e-2)  # bfloat16 rounds


def names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_nothing_half_written_is_left(policies: list[Path], tmp_path: Path) -> None:
    """A tensor of another shape is found when the first ones are written already."""
    file = policies[1] / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"][:-1].contiguous()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has the shapes"):
        run(policies[:2], tmp_path / "new" / "mean")
    assert list((tmp_path / "new").iterdir()) == []
