"""Two steps of every setting that changes the algorithm, from recipe to ``final/``, on a Gemma of one layer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.assemble.policy import objective
from rlhf.errors import ExitCode, UserError
from rlhf.objectives.presets import OBJECTIVES
from rlhf.objectives.reinforce import Reinforce
from rlhf.recipe import Recipe, load_recipe, sections

SCRATCH = "{scratch: {family: gemma, layers: 1, hidden_size: 32, heads: 2, vocab_size: 512}, compute_dtype: float32}"
# The schedule's horizon is the run's own two steps; the first has the full learning rate.
RECIPE = """
objective: reinforce
run: {name: tiny, seed: 7, steps: 2}
policy: {path: "SFT", compute_dtype: float32}
reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}
data:
  train: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 16}]
  instruction: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 16}]
rollout: {samples_per_prompt: 2, max_new_tokens: 8}
kl: {beta: 0.1}
optim: {lr: 1.0e-2}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
eval: {every_steps: null}
checkpoint: {every_steps: 1}
tracking: {to: []}
"""
BASELINES = [name for name in get_args(sections.Baseline) if name != "value"]
LOSSES = list(get_args(sections.Kl.model_fields["loss_estimator"].annotation))
LORA = ("policy.lora.r=4", "policy.lora.alpha=8")

pytestmark = [
    # peft asks transformers 5 for an attribute by its old name while it wraps a model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``final/`` of one SFT step: the policy that every run below starts from."""
    folder = tmp_path_factory.mktemp("sft")
    text = RECIPE.replace("objective: reinforce", "objective: sft").replace("steps: 2", "steps: 1")
    text = text.replace('{path: "SFT", compute_dtype: float32}', SCRATCH)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    assert rlhf.train(str(folder / "recipe.yaml"), f"run.output_dir={folder}/run") == ExitCode.DONE
    return folder / "run" / "final"


@pytest.fixture
def recipe(sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file in a folder of its own, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("SFT", str(sft)), encoding="utf-8")
    return "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """A run directory, read back."""

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return found

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row of the training steps each."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "policy/loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(self.path / "final")
        return {name: value.detach() for name, value in model.state_dict().items()}


def train(recipe: str, *overrides: str, name: str = "tiny") -> Run:
    code = rlhf.train(recipe, f"run.name={name}", *overrides)
    assert code == ExitCode.DONE
    return Run(Path("runs") / f"{name}-reinforce")


def assert_sound(run: Run, sft: Path) -> None:
    """Finished; finite; it began at the reference exactly and left it; ``final/`` is a model that has learned."""
    assert (run.record["status"], run.record["exit_code"], run.record["step"]) == ("finished", 0, 2)
    first, second = run.metrics
    assert (first["step"], second["step"]) == (1, 2)
    numbers = {name: value for row in (first, second) for name, value in row.items() if isinstance(value, int | float)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert first["optim/grad_norm"] > 0 and first["optim/skipped"] == 0
    assert first["kl/reference"] == 0 and first["kl/reference_per_token"] == 0  # to the last bit
    assert second["kl/reference"] != 0
    before = AutoModelForCausalLM.from_pretrained(sft).state_dict()
    after = run.weights
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())
    assert all(bool(value.isfinite().all()) for value in after.values())


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
    for key, (field, value) in settings.items():
        override = key if "=" in key else f"{key}={value}"
        found = objective(load_recipe(recipe, [override]))
        assert found == replace(Reinforce(beta=0.1), **{field: value}), override


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


# A value of its own for every key that fills a field, so that two keys cannot be mixed up.
VALUES: dict[str, Any] = {
    **{"kl.beta": 0.31, "kl.target": 7.0, "kl.estimator": "exact", "kl.credit": "to_go", "kl.loss_beta": 0.17},
    **{"kl.loss_estimator": "k3", "rollout.temperature": 0.9, "reinforce.baseline": "shrinkage"},
    **{"reinforce.divide_by": "group_std", "reinforce.average": "tokens", "reinforce.skip_zero_variance": True},
    **{"reinforce.updates_per_rollout": 2, "reinforce.importance_cap": 3.5, "reinforce.importance": "mask"},
    **{"value.warmup_steps": 1, "value.clip": 0.23, "value.coefficient": 0.29, "ppo.clip": 0.11, "ppo.gamma": 0.97},
    **{"ppo.gae_lambda": 0.91, "ppo.epochs": 3, "ppo.minibatches": 4, "ppo.stop_kl": 0.37, "ppo.whiten_rewards": True},
    **{"ppo.whiten_advantages": True, "dpo.loss": "ipo", "dpo.labels": "hard", "dpo.beta": 0.41},
    **{"dpo.label_smoothing": 0.13, "simpo.beta": 2.3, "simpo.margin": 0.7},
}


def test_every_field_of_every_objective_is_filled(recipe: str) -> None:
    plain = load_recipe(recipe)
    for name, entry in OBJECTIVES.items():
        if entry.settings is None:
            continue
        keys = {key for names in entry.settings.values() for key in names}
        changed = plain.model_dump(mode="json") | {"objective": name}
        for key in keys:
            section, _, field = key.partition(".")
            changed[section] = {**changed[section], field: entry.pins.get(key, VALUES[key])}
        made = objective(Recipe.model_validate_json(json.dumps(changed)))
        assert made.name == name
        for field, names in entry.settings.items():
            assert getattr(made, field) == entry.pins.get(names[0], VALUES[names[0]]), (name, field)
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
