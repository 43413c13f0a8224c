"""Two steps of every objective, from recipe to ``final/``: the word swapped, and what each brings of its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.assemble.policy import objective
from rlhf.errors import ExitCode
from rlhf.objectives.presets import OBJECTIVES
from rlhf.recipe import Recipe, load_recipe
from tests.end_to_end.runs import LORA, Run, assert_sound, train

pytestmark = [
    # peft asks transformers 5 for an attribute by its old name while it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


# A value of its own for every key that fills a field, so that two keys cannot be mixed up.
VALUES: dict[str, Any] = {
    **{"kl.beta": 0.31, "kl.target": 7.0, "kl.estimator": "exact", "kl.credit": "to_go", "kl.loss_beta": 0.17},
    **{"kl.loss_estimator": "k3", "rollout.temperature": 0.9, "reinforce.baseline": "shrinkage"},
    **{"reinforce.divide_by": "group_std", "reinforce.average": "tokens", "reinforce.skip_zero_variance": True},
    **{"reinforce.updates_per_rollout": 2, "reinforce.importance_cap": 3.5, "reinforce.importance": "mask"},
    **{"value.warmup_steps": 1, "value.clip": 0.23, "value.coefficient": 0.29, "ppo.clip": 0.11, "ppo.gamma": 0.97},
    **{"ppo.gae_lambda": 0.91, "ppo.epochs": 3, "ppo.minibatches": 4, "ppo.stop_kl": 0.37, "ppo.whiten_rewards": True},
    **{"ppo.whiten_advantages": True, "dpo.loss": "ipo", "dpo.labels": "hard", "dpo.beta": 0.41},
    **{"dpo.label_smoothing": 0.13, "simpo.beta": 2.3, "simpo.margin": 0.7, "rollout.correction": 1.7},
    "rollout.ahead": False,  # with it there is no correction; below
}
# What follows from other keys, and those.
DERIVED = {"rollout.correction": {"engine": "vllm", "mismatch_cap": 1.7}}


def test_every_field_of_every_objective_is_filled(recipe: str) -> None:
    plain = load_recipe(recipe)
    for name, entry in OBJECTIVES.items():
        if entry.settings is None:
            continue
        keys = {key for names in entry.settings.values() for key in names}
        changed = plain.model_dump(mode="json") | {"objective": name}
        for key in keys:
            section, _, field = key.partition(".")
            changed[section] |= DERIVED.get(key, {field: entry.pins.get(key, VALUES.get(key))})
        made = objective(Recipe.model_validate_json(json.dumps(changed)))
        assert made.name == name
        for field, names in entry.settings.items():
            assert getattr(made, field) == entry.pins.get(names[0], VALUES[names[0]]), (name, field)
    assert objective(plain).mismatch_cap is None  # type: ignore[attr-defined]  # the policy itself decodes
    server = ["rollout.engine=vllm", "rollout.url=http://127.0.0.1:8000", "rollout.ahead=true"]
    ahead: Any = objective(load_recipe(recipe, server))
    assert ahead.stale and ahead.mismatch_cap is None
    assert objective(load_recipe(recipe, ["objective=dpo", "kl.beta=0.3"])).beta == 0.3  # type: ignore[attr-defined]


FAMILY = [name for name, entry in OBJECTIVES.items() if entry.program == "policy"]  # dpo has tests of its own


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("objective_name", FAMILY)
def test_one_word_swaps_the_objective(recipe: str, sft: Path, objective_name: str, weights: Sequence[str]) -> None:
    assert rlhf.train(recipe, f"objective={objective_name}", *weights) == ExitCode.DONE
    run = Run(Path("runs") / f"tiny-{objective_name}")
    if not weights:
        assert_sound(run, sft)
    pinned = OBJECTIVES[objective_name].pins
    saved = load_recipe(str(run.path / "recipe.yaml"))
    assert all(reduce(getattr, key.split("."), saved) == value for key, value in pinned.items())
    assert objective(saved).name == objective_name


def test_ppo_takes_several_steps_and_trains_a_critic(recipe: str, sft: Path) -> None:
    """Resumed in the middle it ends as if it had never stopped, critic included; final/ is the policy alone."""
    settings = ("objective=ppo", "ppo.epochs=2", "ppo.minibatches=2", "ppo.whiten_advantages=true", "kl.target=3.0")
    assert rlhf.train(recipe, *settings) == ExitCode.DONE
    run = Run(Path("runs") / "tiny-ppo")
    assert_sound(run, sft)
    first, second = run.metrics
    assert 0 < first["policy/effective_sample_share"] < 1
    assert second["value/squared_error"] != first["value/squared_error"]
    assert (first["kl/beta"], second["kl/beta"]) == (0.1, pytest.approx(0.098))  # the KL was 0, far below the target
    assert not any("critic" in name for name in run.weights)
    state = load_file(sorted((run.path / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert any(name.startswith("critic.") for name in state)
    code = rlhf.train(recipe, *settings, "run.name=halved", "run.max_seconds=0.001")
    assert code == ExitCode.PREEMPTED
    assert rlhf.train(recipe, *settings, "run.name=halved") == ExitCode.DONE
    halved = Run(Path("runs") / "halved-ppo").weights
    assert all(torch.equal(value, halved[name]) for name, value in run.weights.items())


def test_the_critic_starts_from_the_reward_model(recipe: str, sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = "data.train.0.path=rlhf.data.quickstart:preferences"
    assert rlhf.train(recipe, "objective=reward", pairs, "run.name=judge", "run.steps=1") == ExitCode.DONE
    judge = Path("runs") / "judge-reward" / "final"
    capsys.readouterr()
    settings = ("objective=ppo", f'reward.models=[{{path: "{judge}"}}]', "run.steps=1", "value.lr=1e-12")
    assert rlhf.train(recipe, *settings) == ExitCode.DONE
    assert "starts from the policy" not in capsys.readouterr().out
    state = load_file(sorted((Path("runs") / "tiny-ppo" / "checkpoints").iterdir())[-1] / "model.safetensors")
    head = load_file(judge / "model.safetensors")["score.weight"]
    torch.testing.assert_close(state["critic.classifier.score.weight"], head, rtol=0, atol=1e-9)
    assert rlhf.train(recipe, "objective=ppo", "run.steps=1", "run.name=alone") == ExitCode.DONE
    assert "there is no reward model, so the value model starts from the policy" in capsys.readouterr().out


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_dpo_learns_from_the_pairs_of_the_data(recipe: str, sft: Path, weights: Sequence[str]) -> None:
    """The same recipe, one word: its rows have pairs, and its reward judges held-out completions."""
    rows = (
        "data.train.0.path=rlhf.data.quickstart:preferences",
        "data.eval.0.path=rlhf.data.quickstart:heldout_prompts",
    )
    assert rlhf.train(recipe, "objective=dpo", *rows, "eval.samples=4", *weights) == ExitCode.DONE
    run = Run(Path("runs") / "tiny-dpo")
    first, second = run.metrics
    assert first["policy/loss"] == pytest.approx(math.log(2), abs=1e-6)  # at the reference every margin is 0
    assert first["policy/pair_margin"] == first["policy/better_mean"] == 0
    assert second["policy/pair_margin"] != 0 and math.isfinite(second["policy/loss"])
    phases = [json.loads(line).get("phase") for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert phases.count("before") == phases.count("after") == 4
    assert (run.path / "report.html").is_file()


def test_simpo_learns_without_a_reference(recipe: str, sft: Path) -> None:
    rows = "data.train.0.path=rlhf.data.quickstart:preferences"
    assert rlhf.train(recipe, "objective=simpo", rows) == ExitCode.DONE
    first, second = Run(Path("runs") / "tiny-simpo").metrics
    assert first["optim/grad_norm"] > 0 and second["policy/pair_margin"] != first["policy/pair_margin"]
    assert first["policy/better_mean"] < 0 and not list(Path("runs").glob(".reference/*"))


def test_dpo_says_when_its_held_out_prompts_are_trained_on(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"data.{part}.0.path=rlhf.data.quickstart:preferences" for part in ("train", "eval")]
    assert rlhf.train(recipe, "objective=dpo", *rows, "eval.samples=2", "run.steps=1") == ExitCode.DONE
    assert "have a prompt that is in data.train too" in capsys.readouterr().out


def test_dpo_online_takes_its_pairs_from_its_own_rollouts(recipe: str, sft: Path) -> None:
    assert rlhf.train(recipe, "objective=dpo", "dpo.online=true", "rollout.samples_per_prompt=3") == ExitCode.DONE
    run = Run(Path("runs") / "tiny-dpo")
    assert_sound(run, sft)
    assert run.metrics[0]["completion/length_mean"] > 0  # it sampled


def test_ppo_reduces_to_reinforce_through_the_recipes(recipe: str) -> None:
    """One epoch, one minibatch, γ = λ = 1, a critic that says 0 and stays it: the first step's gradient, before
    clipping, is that of reinforce without baseline and with to-go credit. Adam's first moment is a tenth of it."""
    plain = ("ppo.epochs=1", "ppo.gamma=1.0", "ppo.gae_lambda=1.0", "value.init=zeros", "value.coefficient=0.0")
    both = ("run.steps=1", "optim.max_grad_norm=null", "rollout.max_new_tokens=6", "kl.beta=0.3")
    moved = ("policy.path=runs/moved-reinforce/final", f"reference.path={load_recipe(recipe).policy.path}")
    train(recipe, name="moved")  # so that there is a KL to be charged with

    def gradient(objective: str, *settings: str) -> Tensor:
        name = f"run.name={len(settings)}"
        assert rlhf.train(recipe, f"objective={objective}", *settings, *both, *moved, name) == ExitCode.DONE
        folder = Path("runs") / f"{len(settings)}-{objective}" / "checkpoints" / "step-00000001"
        moments = load_file(folder / "optimizer.safetensors")
        kept = sorted(key for key in moments if key.startswith("causal_lm.") and key.endswith(".exp_avg"))
        return torch.cat([moments[key].flatten() for key in kept]).double()

    expected = gradient("reinforce", "reinforce.baseline=none", "kl.credit=to_go")
    for clip in ("ppo.clip=0.0", "ppo.clip=0.5"):
        found = gradient("ppo", *plain, clip)
        assert float((found - expected).norm() / expected.norm()) <= 1e-6
        shutil.rmtree(Path("runs") / "6-ppo")
    other = gradient("ppo", *plain, "ppo.clip=0.0", "ppo.gae_lambda=0.9")
    assert float((other - expected).norm() / expected.norm()) > 1e-3


def test_ppo_stops_its_passes_where_the_policy_has_gone_too_far(recipe: str, sft: Path) -> None:
    settings = ("objective=ppo", "ppo.epochs=3", "ppo.minibatches=2")
    assert rlhf.train(recipe, *settings, "ppo.stop_kl=1e-9", "run.name=stopped") == ExitCode.DONE
    stopped = Run(Path("runs") / "stopped-ppo")
    assert [row["optim/updates"] for row in stopped.metrics] == [2, 2]  # an epoch is finished, the next not begun
    assert rlhf.train(recipe, *settings, "ppo.stop_kl=1000", "run.name=free") == ExitCode.DONE
    free = Run(Path("runs") / "free-ppo")
    assert [row["optim/updates"] for row in free.metrics] == [6, 6]
    # The learning rate goes by the place in the plan, so a shorter first step does not shift the second.
    assert stopped.metrics[1]["optim/lr"] > free.metrics[1]["optim/lr"] > 0
    assert all(0 < row["policy/entropy"] < 7 and 0 <= row["policy/clip_fraction"] <= 1 for row in free.metrics)


def test_the_critic_alone_is_trained_first(recipe: str, sft: Path) -> None:
    settings = ("objective=a2c", "value.warmup_steps=2", "run.steps=3", "checkpoint.keep=3")
    assert rlhf.train(recipe, *settings) == ExitCode.DONE
    run = Run(Path("runs") / "tiny-a2c")
    before = {f"causal_lm.{n}": v for n, v in AutoModelForCausalLM.from_pretrained(sft).state_dict().items()}
    first, second, third = (load_file(p / "model.safetensors") for p in sorted((run.path / "checkpoints").iterdir()))
    for earlier, later, learns in ((before, second, False), (first, second, False), (second, third, True)):
        moved = [name for name in later if name in earlier and not torch.equal(earlier[name], later[name])]
        assert any(name.startswith("causal_lm.") for name in moved) is learns
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith("critic."))
    # Stopped during the warm-up and resumed, it ends where it would have ended
    assert rlhf.train(recipe, *settings, "run.name=halved", "run.max_seconds=1e-9") == ExitCode.PREEMPTED
    assert rlhf.train(recipe, *settings, "run.name=halved") == ExitCode.DONE
    halved = Run(Path("runs") / "halved-a2c").weights
    assert all(torch.equal(value, halved[name]) for name, value in run.weights.items())


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_a_shared_critic_trains(recipe: str, sft: Path, weights: Sequence[str]) -> None:
    assert rlhf.train(recipe, "objective=ppo", "value.shared=true", *weights) == ExitCode.DONE
    run = Run(Path("runs") / "tiny-ppo")
    if not weights:
        assert_sound(run, sft)
    state = load_file(sorted((run.path / "checkpoints").iterdir())[-1] / "model.safetensors")
    critic = {name for name in state if name.startswith("critic.")}
    assert critic == {"critic.linear.weight", "critic.linear.bias"} and bool(state["critic.linear.weight"].any())


LIMITED = {"reinforce": (), "ppo": (), "dpo": ("data.train.0.path=rlhf.data.quickstart:preferences",), "sft": ()}


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", LIMITED)
def test_steps_are_kept_within_a_kl(recipe: str, name: str, weights: Sequence[str]) -> None:
    limit = ("optim.kl_step_limit=1e-4", *LIMITED[name], *weights)
    assert rlhf.train(recipe, f"objective={name}", *limit) == ExitCode.DONE
    for row in Run(Path("runs") / f"tiny-{name}").metrics:
        # PPO's figures are means of two steps; 5 % over is let be
        assert 0 < row["optim/step_kl"] <= 1.05e-4 and 0 < row["optim/step_share"] < 1


def test_trpo_goes_as_far_as_it_may(recipe: str, sft: Path) -> None:
    assert rlhf.train(recipe, "objective=trpo", "trpo.max_kl=0.01", "trpo.iterations=4") == ExitCode.DONE
    run = Run(Path("runs") / "tiny-trpo")
    assert_sound(run, sft)
    for row in run.metrics:
        assert 0.001 < row["optim/step_kl"] <= 0.01
    # Whole weights and the same noise: a run told to stop goes on as if nothing had happened
    settings = ("objective=trpo", "trpo.max_kl=0.01", "trpo.iterations=4", "run.name=halved")
    assert rlhf.train(recipe, *settings, "run.max_seconds=1e-9") == ExitCode.PREEMPTED
    assert rlhf.train(recipe, *settings) == ExitCode.DONE
    halved = Run(Path("runs") / "halved-trpo").weights
    assert all(torch.equal(value, halved[name]) for name, value in run.weights.items())
