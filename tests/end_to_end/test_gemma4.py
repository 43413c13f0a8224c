"""REINFORCE on a Gemma 4 that also sees: its text model is trained, planned for, and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlhf
from rlhf.errors import ExitCode, UserError
from rlhf.models.load import load_causal_lm
from rlhf.programs.plan import Options, plan_of
from rlhf.recipe import load_recipe
from tests import gemma4
from tests.end_to_end.runs import LORA, RECIPE, Run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SFT", "seeing"), encoding="utf-8")
    return tmp_path


# peft asks transformers 5 for an attribute by its old name while it wraps a model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("kind", "settings"), [("small", ()), ("large", LORA), ("small", ("kl.estimator=exact",))])
def test_reinforce_trains_its_text_model(place: Path, kind: str, settings: tuple[str, ...]) -> None:
    gemma4.write(place / "seeing", kind)
    assert rlhf.train("recipe.yaml", *settings) == ExitCode.DONE
    run = Run(Path("runs") / "tiny-reinforce")
    first, second = run.metrics
    assert first["kl/reference"] == 0 != second["kl/reference"] and first["optim/grad_norm"] > 0
    trained, before = load_causal_lm(str(run.path / "final")), load_causal_lm("seeing")
    old = dict(before.named_parameters())
    moved = {name for name, value in trained.named_parameters() if not torch.equal(value, old[name])}
    assert trained.state_dict().keys() == before.state_dict().keys()
    assert any("self_attn" in name for name in moved) and any("mlp" in name for name in moved)


def test_a_plan_counts_its_text_model(place: Path) -> None:
    gemma4.write(place / "seeing", "small")
    plan = plan_of(load_recipe("recipe.yaml"), Options(), place)
    assert plan.setup.policy.parameters == sum(p.numel() for p in load_causal_lm("seeing").parameters())
    assert plan.setup.rollouts.engine == "generate"


def test_experts_are_refused_by_a_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gemma4.write(place / "seeing", "large")
    file = place / "seeing" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {
        "enable_moe_block": True,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 8,
    }
    file.write_text(json.dumps(config))
    assert rlhf.train("recipe.yaml") == ExitCode.USER
    assert "policy.path=seeing: a mixture of experts" in capsys.readouterr().err
    with pytest.raises(UserError, match="a mixture of experts"):
        plan_of(load_recipe("recipe.yaml"), Options(), place)
