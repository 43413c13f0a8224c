"""Two steps of every setting that changes the algorithm, from recipe to ``final/``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.assemble.policy import objective
from rlhf.errors import ExitCode, UserError
from rlhf.objectives.reinforce import Reinforce
from rlhf.recipe import load_recipe, sections
from rlhf.sampling.completions import Completion
from rlhf.sampling.engine import Request
from tests.end_to_end.runs import LORA, RECIPE, SCRATCH, Run, assert_sound, train
from tests.sampling.engines import TOKEN, Copy, served

BASELINES = [name for name in get_args(sections.Baseline) if name != "value"]
LOSSES = list(get_args(sections.Kl.model_fields["loss_estimator"].annotation))

pytestmark = [
    # peft asks transformers 5 for an attribute by its old name while it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("estimator", ["k1", "exact"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_baseline_trains(recipe: str, sft: Path, baseline: str, estimator: str) -> None:
    run = train(recipe, f"reinforce.baseline={baseline}", f"kl.estimator={estimator}")
    assert_sound(run, sft)
    assert ("loss/kl" in run.metrics[0]) == (estimator == "exact")
    if estimator == "exact":
        assert run.metrics[0]["loss/kl"] == 0 and run.metrics[1]["loss/kl"] > 0


def test_the_value_baseline_is_refused(recipe: str) -> None:
    """The one name of the schema that no run can use: else the list above would have to hold it."""
    with pytest.raises(UserError, match="value needs a critic"):
        rlhf.train(recipe, "reinforce.baseline=value")


def test_every_setting_reaches_the_objective(recipe: str) -> None:
    """Two steps cannot tell some of them apart: of two samples, optimal_token and leave_one_out are the same number."""
    settings = {
        "kl.beta": ("beta", 0.3),
        "kl.estimator": ("estimator", "exact"),
        "kl.credit": ("credit", "to_go"),
        "kl.loss_beta": ("loss_beta", 0.2),
        "kl.loss_estimator": ("loss_estimator", "k3"),
        "rollout.temperature": ("temperature", 0.7),
        **{f"reinforce.baseline={name}": ("baseline", name) for name in BASELINES},
    }
    for key, (name, value) in settings.items():
        override = key if "=" in key else f"{key}={value}"
        found = objective(load_recipe(recipe, [override]))
        assert found == replace(Reinforce(beta=0.1), **{name: value}), override


@pytest.mark.parametrize("baseline", ["none", "leave_one_out", "shrinkage"])
def test_to_go_credit_trains(recipe: str, sft: Path, baseline: str) -> None:
    assert_sound(train(recipe, "kl.credit=to_go", f"reinforce.baseline={baseline}"), sft)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_kl_in_the_loss_trains(recipe: str, sft: Path, loss: str, beta: float) -> None:
    run = train(recipe, f"kl.beta={beta}", "kl.loss_beta=0.1", f"kl.loss_estimator={loss}")
    assert_sound(run, sft)
    assert run.metrics[0]["loss/kl_loss"] == 0 and run.metrics[1]["loss/kl_loss"] > 0  # each form is ≥ 0


def test_gold_completions_are_mixed_into_the_update(recipe: str, sft: Path) -> None:
    """At lr 1e-2 a step on four demonstrations of some thirty tokens is felt in the weights at once."""
    mixed, plain = train(recipe, "instruction.coefficient=0.5", name="mixed"), train(recipe, name="plain")
    assert_sound(mixed, sft)
    assert mixed.metrics[0]["loss/instruction"] > 0 and "loss/instruction" not in plain.metrics[0]
    assert mixed.metrics[0]["kl/instruction"] == 0  # the policy is still the reference, to the last bit
    assert mixed.metrics[1]["kl/instruction"] < 0  # it has learned from the rows more than it forgot
    assert mixed.metrics[0]["reward/score_mean"] == plain.metrics[0]["reward/score_mean"]  # the same first rollout
    assert mixed.metrics[0]["optim/grad_norm"] != plain.metrics[0]["optim/grad_norm"]


@pytest.mark.parametrize(
    "settings",
    [(), ("kl.estimator=exact",), ("reinforce.baseline=greedy",), ("instruction.coefficient=0.5",)],
    ids=["k1", "exact", "greedy", "instruction"],
)
def test_lora_trains(recipe: str, sft: Path, settings: Sequence[str]) -> None:
    """The adapter switched off is the reference; ``final/`` holds the adapter and names the base."""
    run = train(recipe, *LORA, *settings)
    assert_sound(run, sft)
    files = {path.name for path in (run.path / "final").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    before = AutoModelForCausalLM.from_pretrained(sft).state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in run.weights.items() if "lora_" not in name}
    assert kept.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in kept.items())


@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_layers_computed_again_end_at_the_same_weights(recipe: str, weights: Sequence[str]) -> None:
    kept, again = (train(recipe, *weights, f"batch.activations={how}", name=how) for how in ("keep", "recompute"))
    for name, value in kept.weights.items():
        assert torch.equal(value, again.weights[name]), name


@pytest.mark.parametrize("settings", [LORA, ("reinforce.baseline=moving_average",)], ids=["lora", "moving_average"])
def test_a_run_told_to_stop_goes_on_as_if_nothing_had_happened(recipe: str, settings: Sequence[str]) -> None:
    whole = train(recipe, *settings, name="whole")
    # No time at all: it saves and leaves after its first step, and the same command without a limit goes on
    assert rlhf.train(recipe, "run.name=halved", *settings, "run.max_seconds=1.0e-9") == ExitCode.PREEMPTED
    halved = Run(Path("runs") / "halved-reinforce")
    assert halved.record["status"] == "preempted" and len(halved.metrics) == 1
    assert train(recipe, *settings, name="halved") == halved
    assert [row["policy/loss"] for row in halved.metrics] == [row["policy/loss"] for row in whole.metrics]
    expected, found = whole.weights, halved.weights
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_final_of_a_lora_run_starts_the_next_run(recipe: str, sft: Path) -> None:
    train(recipe, *LORA, name="first")
    assert_sound(train(recipe, "policy.path=runs/first-reinforce/final", name="second"), sft)


def test_exact_local_beside_k1_trains_with_a_baseline_of_penalized_rewards(recipe: str, sft: Path) -> None:
    settings = ("kl.loss_beta=0.1", "kl.loss_estimator=exact_local", "reinforce.baseline=shrinkage")
    assert_sound(train(recipe, *settings), sft)


def test_a_changed_input_is_not_resumed(recipe: str, sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The policy's folder has other weights than when the run was started: its checkpoint is not a part of this run."""
    shutil.copytree(sft, "policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.programs.launch._export", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        assert rlhf.train(recipe, "policy.path=./policy") == ExitCode.USER
    config = Path("policy/config.json")
    config.write_text(config.read_text() + " ", encoding="utf-8")
    assert rlhf.train(recipe, "policy.path=./policy") == ExitCode.USER
    assert "policy.path changed since runs/tiny-reinforce was started" in capsys.readouterr().err


def test_what_a_reward_function_notes_stands_beside_its_completion(recipe: str) -> None:
    """``log_extra`` of TRL's signature: a column of samples.jsonl; what JSON cannot say is text."""
    code = (
        "def noted(completions, log_extra, **columns):\n"
        "    log_extra('words', [len(text[0]['content'].split()) for text in completions])\n"
        "    log_extra('kind', [complex(0, 1)] * len(completions))\n"
        "    return [0.5] * len(completions)\n"
    )
    Path("my_noting_rewards.py").write_text(code, encoding="utf-8")
    run = train(recipe, "reward.functions.0.call=my_noting_rewards:noted", "tracking.samples=2")
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4  # two of each step
    for row in rows:
        assert row["extra"] == {"words": len(row["completion"].split()), "kind": "1j"}


def test_a_reward_function_of_trl_runs_as_it_is(recipe: str, sft: Path) -> None:
    """By dotted name, with TRL's signature: conversational completions are message lists."""
    run = train(recipe, 'reward.functions=[{call: "trl.rewards:think_format_reward"}]', "rollout.samples_per_prompt=2")
    assert [row["reward/score_mean"] for row in run.metrics] == [0.0, 0.0]  # no tiny model writes <think> by chance
    assert all(row["reward/valid_rate"] == 1.0 for row in run.metrics)


@pytest.mark.parametrize("settings", [("reference.ema=0.5",), ("reference.reset_steps=1",)], ids=["ema", "reset"])
@pytest.mark.parametrize("weights", [(), LORA], ids=["full", "lora"])
def test_the_reference_follows(recipe: str, sft: Path, settings: Sequence[str], weights: Sequence[str]) -> None:
    """Stopped and resumed it is where it was; reset after each step the KL is 0 again; in between it is smaller."""
    more = (*settings, *weights, "run.steps=3")
    moving = train(recipe, *more, name="moving")
    still = train(recipe, *weights, "run.steps=3", name="still")
    found, fixed = (run.metrics[1]["kl/reference"] for run in (moving, still))
    assert found == 0 if "reference.reset_steps=1" in settings else 0 < abs(found) < abs(fixed), (found, fixed)
    assert rlhf.train(recipe, "run.name=halved", *more, "run.max_seconds=1.0e-9") == ExitCode.PREEMPTED
    halved = train(recipe, *more, name="halved")
    assert [row["kl/reference"] for row in halved.metrics] == [row["kl/reference"] for row in moving.metrics]
    assert all(torch.equal(value, moving.weights[name]) for name, value in halved.weights.items())
    checkpoint = load_file(sorted((halved.path / "checkpoints").iterdir())[-1] / "reference.safetensors")
    trained = load_file(sorted((halved.path / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert {f"causal_lm.{name}" for name in checkpoint} == trained.keys()


def test_a_reference_of_another_shape_cannot_follow(recipe: str, tmp_path: Path) -> None:
    other = SCRATCH.replace("hidden_size: 32", "hidden_size: 48")
    text = RECIPE.replace("objective: reinforce", "objective: sft").replace(
        '{path: "SFT", compute_dtype: float32}', other
    )
    (tmp_path / "other.yaml").write_text(text, encoding="utf-8")
    assert rlhf.train("other.yaml", "run.name=other", "run.steps=1") == ExitCode.DONE
    path = "reference.path=runs/other-sft/final"
    assert rlhf.train(recipe, path, "reference.ema=0.5") == ExitCode.USER
    assert "another architecture" in Run(Path("runs") / "tiny-reinforce").record["exit_reason"]


def test_a_spent_rollout_is_told_once(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe, "reinforce.updates_per_rollout=4", "optim.lr=0.3", "run.steps=3")
    said = [line for line in capsys.readouterr().out.splitlines() if "policy/effective_sample_share is" in line]
    assert len(said) == 1 and "it is spent" in said[0]


def test_several_updates_of_one_rollout(recipe: str, sft: Path) -> None:
    run = train(recipe, "reinforce.updates_per_rollout=3")
    assert_sound(run, sft)
    shares = [row["policy/effective_sample_share"] for row in run.metrics]
    assert all(0 < share < 1 for share in shares)  # the policy has left the one that sampled
    state = json.loads((sorted((run.path / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["train"]["optimizer_step"] == 6


@pytest.mark.parametrize("objective", ["reinforce", "ppo", "a2c"])
def test_a_server_decodes_a_step_ahead(recipe: str, sft: Path, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pushes for three steps, the first of other weights; the weights of completions show from step 2."""
    monkeypatch.setenv("POLICY_TOKEN", TOKEN)
    engine = Copy(lm=AutoModelForCausalLM.from_pretrained(sft).eval())
    with served(engine) as url:
        where = ("rollout.engine=vllm", f"rollout.url={url}", "rollout.token_env=POLICY_TOKEN", "rollout.ahead=true")
        code = rlhf.train(recipe, f"objective={objective}", "run.steps=3", "ppo.minibatches=2", *where)
    assert code == ExitCode.DONE
    run = Run(Path("runs") / f"tiny-{objective}")
    assert [entry for entry in engine.log if entry == "push"] == ["push"] * 4
    assert list((run.path / "pushed").iterdir()) == []
    shares = [row["policy/effective_sample_share"] for row in run.metrics]
    assert all(0 < share <= 1.0001 for share in shares)
    assert all(("policy/sampler_gap" in row) == (objective != "ppo") for row in run.metrics)  # see docs/algorithms.md
    if objective != "ppo":  # whose shares are of its last epoch: it has moved away from any rollout
        assert shares[0] == pytest.approx(1.0, abs=1e-5) and shares[1] < 0.999


def test_each_run_pushes_through_a_folder_of_its_own(
    recipe: str, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one recipe, the second one numbered, may share `rollout.push_folder`."""
    monkeypatch.setenv("POLICY_TOKEN", TOKEN)
    engine, shared = Copy(lm=AutoModelForCausalLM.from_pretrained(sft).eval()), tmp_path / "shared"
    with served(engine) as url:
        engine_at = ("rollout.engine=vllm", f"rollout.url={url}", "rollout.token_env=POLICY_TOKEN")
        where = (*engine_at, "run.steps=1", "run.resume=never")
        for each in ((), (), (f"rollout.push_folder={shared}",), (f"rollout.push_folder={shared}",)):
            assert rlhf.train(recipe, *where, *each) == ExitCode.DONE
    assert [(Path("runs") / name / "pushed").exists() for name in ("tiny-reinforce", "tiny-reinforce-2")] == [True] * 2
    assert sorted(path.name[: -len("-12345678")] for path in shared.iterdir()) == [
        "tiny-reinforce-3",
        "tiny-reinforce-4",
    ]


@dataclass
class Stuck(Copy):
    """Never gives an answer beyond the first ``rows``, until it is let go."""

    rows: int = 0
    reached: int = 0
    let_go: threading.Event = field(default_factory=threading.Event)

    def decode(self, request: Request, max_new_tokens: int) -> Completion:
        self.reached += 1
        if self.reached > self.rows:
            self.let_go.wait()
        return super().decode(request, max_new_tokens)


@pytest.mark.slow  # a process that imports everything
def test_a_stop_does_not_wait_for_the_server_that_decodes_ahead(recipe: str, sft: Path) -> None:
    """4 rows to look at and 8 of step 1, 4 to look at of step 2; its own 8 never come."""
    engine = Stuck(lm=AutoModelForCausalLM.from_pretrained(sft).eval(), rows=16)
    with served(engine) as url:
        where = ("rollout.engine=vllm", f"rollout.url={url}", "rollout.token_env=POLICY_TOKEN", "rollout.ahead=true")
        command = [sys.executable, "-m", "rlhf", "train", recipe, *where, "run.max_seconds=1.0e-9"]
        try:
            done = subprocess.run(command, env={**os.environ, "POLICY_TOKEN": TOKEN}, timeout=120)
        finally:
            engine.let_go.set()
    assert done.returncode == ExitCode.PREEMPTED and engine.reached > 16
