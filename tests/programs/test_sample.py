"""Completions of a run, side by side with those of the model it started from. One tiny run serves all tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.errors import UserError
from rlhf.programs import launch
from rlhf.programs.run_folder import Request, open_folder
from rlhf.programs.sample import Completion, Sample
from rlhf.programs.sample_show import plain_lines, show
from rlhf.recipe import load_recipe

# peft asks transformers for it when it wraps a model
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SFT = """
objective: sft
run: {name: t, steps: 2}
policy: {scratch: {family: gemma, layers: 1, hidden_size: 32, heads: 2, vocab_size: 400}, compute_dtype: float32}
data: {train: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 32}]}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
tracking: {to: []}
"""
REINFORCE = """
objective: reinforce
run: {name: t, steps: 2}
policy: {path: runs/t-sft/final, compute_dtype: float32}
reward:
  functions: [{call: "rlhf.data.quickstart:gold"}, {call: "my_scores:by_topic", weight: 0}]
  missing_eos_score: null
data:
  train: [{path: "rlhf.data.quickstart:preferences", max_rows: 32}]
  eval: [{path: "rlhf.data.quickstart:heldout_prompts", max_rows: 5}]
rollout: {samples_per_prompt: 2, max_new_tokens: 8}
optim: {lr: 5.0e-2, schedule: constant, warmup_ratio: 0.0}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
checkpoint: {every_steps: 1}
tracking: {to: []}
"""
SCORES = "def by_topic(completions, colour, **columns):\n    return [1.0 for _ in completions]\n"
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs t-sft, t-reinforce and t-lora; the function of weight 0 lacks its column."""
    place = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(place)
    try:
        Path("my_scores.py").write_text(SCORES.replace("colour", "colour=None"))
        for name, text, changes in (
            ("sft", SFT, ()),
            ("reinforce", REINFORCE, ()),
            ("reinforce", REINFORCE, ("run.name=lora", "policy.lora={r: 2}", "run.steps=1")),
        ):
            Path(f"{name}.yaml").write_text(text)
            assert launch.train(load_recipe(f"{name}.yaml", changes), ["rlhf"]) == 0
        yield place
    finally:
        os.chdir(before)


@pytest.fixture
def place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def rows(place: Path) -> Rows:
    """What ``rlhf sample --json`` writes."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["sample", *arguments, "--json"])
        assert done.exit_code == 0, done.exception
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def logged(place: Path, phase: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / "t-reinforce" / "samples.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row.get("phase") == phase]
    return sorted(found, key=lambda row: row["slot"])


def test_without_further_words_it_is_the_last_evaluation_again(place: Path, rows: Rows) -> None:
    """Same prompts, same noise, same rendering: word for word what the run logged before and after training."""
    found = rows("runs/t-reinforce")
    before, after = logged(place, "before"), logged(place, "after")
    for name in ("prompt", "completion", "tokens", "finished"):
        assert [row[name] for row in found] == [row[name] for row in after[:4]]
    assert [row["start"]["completion"] for row in found] == [row["completion"] for row in before[:4]]
    assert any(row["completion"] != row["start"]["completion"] for row in found)  # the lr is large: it did learn
    assert [row["scores"]["gold"] for row in found] == pytest.approx([row["scores"]["gold"] for row in after[:4]])
    assert found[0]["run"] == "t-reinforce" and found[0]["start"]["model"] == "runs/t-sft/final"


def test_a_typed_prompt_is_a_user_turn_where_the_run_was_trained_on_turns(rows: Rows) -> None:
    (first, second) = rows("runs/t-reinforce", "--prompt", "Hi", "--count", "2", "--seed", "3", "--alone")
    assert (first["prompt"], first["sample"], second["sample"]) == ("user: Hi", 0, 1)
    assert first["completion"] != second["completion"] and "start" not in first
    (third,) = rows("runs/t-reinforce", "--prompt", "Hi", "--seed", "3", "--alone", "--max-new-tokens", "3")
    assert third["tokens"] == 3 and first["completion"].startswith(third["completion"])
    cold = [rows("runs/t-reinforce", "--prompt", "Hi", "--temperature", "0", "--seed", seed) for seed in "12"]
    assert cold[0] == cold[1]  # the arg-max needs no noise


def test_prompts_from_a_file(place: Path, rows: Rows) -> None:
    (place / "p.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": [{"role": "user", "content": "Bye"}]}\n')
    assert [row["prompt"] for row in rows("runs/t-reinforce", "--file", "p.jsonl")] == ["user: Hi", "user: Bye"]


def test_a_score_that_cannot_be_had_is_noted_once_and_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "my_scores.py").write_text(SCORES)
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    done = CliRunner().invoke(app, ["sample", "runs/t-reinforce", "--prompt", "Hi", "--json"])
    assert done.stderr.count("no scores of by_topic: reward function by_topic asks for colour") == 1
    assert set(json.loads(done.stdout)["scores"]) == {"gold"}


def test_an_unfinished_run_is_sampled_from_its_newest_checkpoint(place: Path) -> None:
    """Its last checkpoint has the weights of final/, so the completions are the same."""
    shutil.copytree("runs/t-reinforce", "runs/cut")
    shutil.rmtree("runs/cut/final")
    done = CliRunner().invoke(app, ["sample", "runs/cut", "--json", "--alone"])
    assert "runs/cut is not finished: samples are of step-00000002" in done.stderr
    found = [json.loads(line)["completion"] for line in done.stdout.splitlines()]
    assert found == [row["completion"] for row in logged(place, "after")[:4]]


def test_adapters_are_put_on_their_base(place: Path, rows: Rows) -> None:
    (row,) = rows("runs/lora-reinforce", "--rows", "1")
    lines = (place / "runs" / "lora-reinforce" / "samples.jsonl").read_text().splitlines()
    after = next(r for r in map(json.loads, lines) if r.get("phase") == "after" and r["slot"] == 0)
    assert row["completion"] == after["completion"]


def test_a_run_from_random_weights_stands_alone(place: Path) -> None:
    done = CliRunner().invoke(app, ["sample", "runs/t-sft", "--rows", "1", "--max-new-tokens", "4", "--side-by-side"])
    told = done.output.splitlines()
    assert "prompts are of data.train" in told[0] and "nothing to compare with" in told[1]
    assert told[2].startswith("prompt: user: ") and told[3].startswith("  t-sft (4 tokens, cut): ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runs/nope"], "runs/nope does not exist; runs here: runs/lora-reinforce, runs/t-reinforce, runs/t-sft"),
        (["runs/t-sft/final"], "runs/t-sft/final is a part of a run; name the run: runs/t-sft"),
        (["."], ". holds no run (no recipe.yaml); name a directory like runs/NAME"),
        (["runs/t-sft", "--file", "none.jsonl"], "--file none.jsonl does not exist"),
        (["runs/t-sft", "--prompt", "a", "--file", "sft.yaml"], "--prompt and --file both name prompts"),
        (["runs/t-sft", "--temperature", "0", "--count", "2"], "--count 2 with --temperature 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(arguments: list[str], says: str, place: Path) -> None:
    shutil.rmtree("runs/cut", ignore_errors=True)
    done = CliRunner().invoke(app, ["sample", *arguments])
    assert isinstance(done.exception, UserError) and str(done.exception).startswith(says)
    assert "\n" not in str(done.exception)


def test_a_wrong_name_is_answered_before_torch_is_imported(place: Path) -> None:
    code = "import sys\nfrom rlhf.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "sample", "runs/nope"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_reward_models_and_empty_runs_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(SFT)
    with pytest.raises(UserError, match="has no final/ and no checkpoint yet"):
        open_folder(run)
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    (run / "recipe.yaml").write_text(SFT.replace("objective: sft", "objective: reward"))
    with pytest.raises(UserError, match="is a reward model: it scores completions and writes none"):
        Request().check(open_folder(run))
    (run / "recipe.yaml").write_text("objective: sft\nrun: {name: t}\nunheard: 1\n")
    with pytest.raises(UserError, match=r"cannot be read by this version \(unheard\)"):
        open_folder(run)


SHOWN = [
    Sample(
        "user: Hi\x1b", 0, Completion("a\nb\x1b[2J", 3, True, {"gold": 1.5}), Completion("c", 2, False, {"gold": None})
    )
]


def test_plain_lines_hold_one_completion_each_and_no_control_characters() -> None:
    assert list(plain_lines(SHOWN, "run", "start")) == [
        r"prompt: user: Hi\x1b",
        "  start (2 tokens, cut, gold unscorable): c",
        r"  run (3 tokens, gold 1.5): a\nb\x1b[2J",
    ]


def test_panels_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show(SHOWN, "run", "start")
    out = capsys.readouterr().out
    assert "╭─ start ─" in out and "─ 3 tokens, gold 1.5 ─" in out
    assert r"b\x1b[2J" in out and "\x1b[2J" not in out
