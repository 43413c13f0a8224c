"""Recipes whose policy, reference and reward model hold one base: from the reward model's run to a resumed policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rlhf
from rlhf.errors import ExitCode
from tests.end_to_end.runs import LORA, Run, train

# peft reads an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIRS = "data.train.0.path=rlhf.data.quickstart:preferences"
SHARED = "reward.models.0.placement=policy_base"


@pytest.fixture
def judged(recipe: str) -> tuple[str, ...]:
    """Overrides of a policy run with a LoRA reward model on its base, which was trained here."""
    code = rlhf.train(recipe, "run.name=judge", "objective=reward", PAIRS, *LORA, "optim.lr=3e-2")
    assert code == ExitCode.DONE
    return ("reward.functions=[]", "reward.models.0.path=runs/judge-reward/final", "run.steps=3", *LORA)


def final(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "final" / "adapter_model.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖Δ‖/‖w‖ over all weights of an adapter."""
    assert sorted(one) == sorted(other)
    left, right = (torch.cat([found[name].flatten() for name in sorted(found)]) for found in (one, other))
    return float((left - right).norm() / left.norm())


def test_a_shared_base_trains_the_policy_of_a_separate_one(
    recipe: str, judged: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps; then the last of them again, from the checkpoint of the second."""
    kept = Path("runs/judge-reward/final/adapter")
    assert {file.name for file in kept.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    separate = train(recipe, *judged, name="separate")
    shared = train(recipe, *judged, SHARED, "checkpoint.keep=3", name="shared")
    assert "judge-reward: an adapter and a head on the policy's base weights" in capsys.readouterr().out
    scores = [[row["reward/score_mean"] for row in run.metrics] for run in (separate, shared)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and len(scores[0]) == 3
    assert apart(final(separate), final(shared)) <= 1e-5
    assert not (shared.path / "final" / "reward_0").exists()
    assert "reward.models.0.path/adapter" in shared.record["hashes"]
    checkpoint = load_file(shared.path / "checkpoints" / "step-00000003" / "model.safetensors")
    assert checkpoint and all(".default.weight" in name for name in checkpoint)
    assert all(float(value.abs().max()) > 1e-4 for name, value in final(shared).items() if "lora_B" in name)  # from 0
    assert _resumed(recipe, judged, shared) == 0


def _resumed(recipe: str, judged: tuple[str, ...], whole: Run) -> float:
    """How far a run that was stopped after two steps, and went on, ends from the one that was not."""
    before = final(whole)
    record = json.loads((whole.path / "run.json").read_text())
    (whole.path / "run.json").write_text(json.dumps({**record, "status": "preempted"}))
    for folder in ("checkpoints/step-00000003", "final"):
        (whole.path / folder).rename(whole.path / f"was-{Path(folder).name}")
    return apart(before, final(train(recipe, *judged, SHARED, "checkpoint.keep=3", name="shared")))


def test_another_base_is_refused_before_a_model_loads(
    recipe: str, judged: tuple[str, ...], sft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model with its weights 1 % larger: one line, and exit code 2."""
    shutil.copytree(sft, "other")
    weights = load_file("other/model.safetensors")
    save_file({name: 1.01 * value for name, value in weights.items()}, "other/model.safetensors", {"format": "pt"})
    code = rlhf.train(recipe, *judged, SHARED, "run.name=other", "policy.path=other")
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == ExitCode.USER and f"its adapter was trained on {sft}, and policy.path=" in told
