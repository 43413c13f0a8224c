"""LoRA on a reward model: the adapter and the head are trained, the base is not, and the export scores the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.examples import Preference
from rlhf.models.load import LoraSpec, add_lora, export, load_causal_lm, load_classifier
from rlhf.models.scalar import ScalarModel, scalar_forward, scalar_stats
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer
from rlhf.objectives.supervised import BradleyTerry
from rlhf.programs.streams import by_prompt, pair_batch
from rlhf.rewards.model import load_reward_model
from rlhf.rollout import Prompt, Turn
from rlhf.runtime.updater import Term, Updater
from tests.support import alone

# peft reads an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TEXTS = ["What is the capital of France?", "The capital of France is Paris.", "I do not care."]
TOKENIZER = train_tokenizer(TEXTS, 300)
PAIRS = [
    Preference(Prompt(row_id=i, turns=(Turn(role="user", content=TEXTS[0][: 8 + i]),)), TEXTS[1][: 9 + i], TEXTS[2])
    for i in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal language model on disk: the trunk that reward models start from."""
    path = tmp_path_factory.mktemp("lm") / "final"
    model = build_causal_lm(build_config("gemma", layers=2, hidden_size=32, heads=2, vocab_size=len(TOKENIZER)), seed=0)
    export(model, TOKENIZER, path, stop_ids=(1, 5), card="")
    return str(path)


def trained(folder: str, targets: Any, steps: int = 3) -> tuple[ScalarModel, Any]:
    peft: Any = add_lora(load_classifier(folder, seed=1), LoraSpec(r=4, alpha=8.0, targets=targets), 1, task="SEQ_CLS")
    model = ScalarModel(peft)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    updater = Updater(alone(), model, optimizer, lambda step: 1e-2, scalar_forward, 10_000)
    batch = pair_batch(by_prompt(PAIRS), TOKENIZER)
    for step in range(1, steps + 1):
        updater.step([Term(objective=BradleyTerry(), batch=batch)], step)
    return model, peft


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_the_exported_folder_scores_as_the_adapter_did(folder: str, targets: Any, tmp_path: Path) -> None:
    start = load_classifier(folder, seed=1)
    model, peft = trained(folder, targets)
    batch = pair_batch(by_prompt(PAIRS), TOKENIZER)
    with torch.no_grad():
        before, after = scalar_stats(ScalarModel(start), batch).scores, scalar_stats(model, batch).scores
    assert before is not None and after is not None
    assert float((after - before).abs().min()) > 1e-3  # it learned something, or the comparison below is of nothing
    export(peft, TOKENIZER, tmp_path / "final", stop_ids=(), card="", merge=True)
    loaded = load_reward_model(str(tmp_path / "final"), device="cpu")
    exported = scalar_stats(ScalarModel(loaded.model), batch).scores
    assert exported is not None
    # W·x + (α/r)·B·A·x against (W + (α/r)·B·A)·x in float32
    assert torch.allclose(exported, after, rtol=0, atol=1e-6)


def test_base_weights_are_those_that_were_loaded(folder: str, tmp_path: Path) -> None:
    start = load_classifier(folder, seed=1).state_dict()
    _, peft = trained(folder, "all-linear")
    export(peft, TOKENIZER, tmp_path / "final", stop_ids=(), card="", merge=True)  # reads, and changes nothing
    base = peft.get_base_model().state_dict()
    kept = {name: base.get(name.replace(".weight", ".base_layer.weight"), base.get(name)) for name in start}
    head = kept.pop("score.weight")
    assert head is None and torch.equal(base["score.original_module.weight"], start["score.weight"])
    assert not torch.equal(base["score.modules_to_save.default.weight"], start["score.weight"])
    assert all(torch.equal(value, start[name]) for name, value in kept.items())


def test_only_the_adapter_and_the_head_are_trained(folder: str) -> None:
    _, peft = trained(folder, "all-linear", steps=0)
    names = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    assert {"lora_" in name or "score.modules_to_save" in name for name in names} == {True}
    assert sum("score" in name for name in names) == 1  # the head in full, and no adapter on it
    assert sum("lora_A" in name for name in names) == 2 * 7  # two layers of seven linear maps


def test_a_classifier_starts_from_an_adapters_folder_as_from_the_merged_model(folder: str, tmp_path: Path) -> None:
    """``final/`` of a LoRA run: its trunk has plain weights, the adapter in them, and all of them can be trained."""
    lm: Any = add_lora(load_causal_lm(folder), LoraSpec(r=4, alpha=8.0), 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    export(lm, TOKENIZER, tmp_path / "sft", stop_ids=(1, 5), card="")
    found: Any = load_classifier(str(tmp_path / "sft"), seed=1)
    merged: Any = load_causal_lm(str(tmp_path / "sft"))
    trunk = {name: value for name, value in found.state_dict().items() if not name.startswith("score.")}
    expected = {name: value for name, value in merged.state_dict().items() if name != "lm_head.weight"}
    assert trunk.keys() == expected.keys() and all(torch.equal(trunk[name], expected[name]) for name in trunk)
    assert all(parameter.requires_grad for parameter in found.parameters())
    plain: Any = load_classifier(folder, seed=1)
    assert torch.equal(found.score.weight, plain.score.weight)  # a head is a function of the seed
