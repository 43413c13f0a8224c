"""The command line in this process and as a process: messages, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf import spawn
from rlhf.cli import app, main
from rlhf.errors import ExitCode, UserError
from rlhf.locate import accelerate_config_file, shipped_accelerate_configs, shipped_recipes
from rlhf.recipe import load_recipe
from tests.recipe.corpus import recipe


@pytest.fixture
def recipe_file(place: Path) -> Path:
    (place / "r.yaml").write_text(recipe(objective="objective: sft", policy="policy: {scratch: {}}"))
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return place / "r.yaml"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "command",
    [
        *("train", "check", "plan", "quickstart", "evaluate", "report", "recipes", "sample", "merge"),
        *("serve-reward", "serve-policy", "env"),
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0 and len(shown.output.split("\n")) > 5


def test_recipes_lists_what_ships() -> None:
    shown = CliRunner().invoke(app, ["recipes"])
    assert all(name in shown.output for name in shipped_recipes())


def test_a_recipe_is_shown_as_it_ships() -> None:
    shown = CliRunner().invoke(app, ["recipes", "show", "quickstart/sft"])
    assert shown.output == shipped_recipes()["quickstart/sft"].read_text(encoding="utf-8")
    missing = run("recipes", "show", "quickstart/stf")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "did you mean quickstart/sft?" in missing.stderr


def test_a_copied_recipe_is_valid_says_what_comes_next_and_overwrites_nothing(place: Path) -> None:
    done = CliRunner().invoke(app, ["recipes", "copy", "quickstart/sft"])
    assert done.exit_code == 0 and done.output.splitlines()[:2] == [
        "copied to quickstart-sft.yaml",
        "next: rlhf check quickstart-sft.yaml",
    ]
    assert load_recipe("quickstart-sft.yaml") == load_recipe("quickstart/sft")
    first = (place / "quickstart-sft.yaml").read_text().split("\n")[0]
    assert (place / first.partition("$schema=")[2]).resolve().name == "recipe.schema.json"
    (place / "quickstart-sft.yaml").write_text("mine")
    again = run("recipes", "copy", "quickstart/sft")
    assert (again.returncode, again.stderr) == (
        2,
        "quickstart-sft.yaml exists and is not overwritten; name another file, or remove it\n",
    )
    assert (place / "quickstart-sft.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("destination", "lands"),
    [("mine.yaml", "mine.yaml"), ("small", "small/reviews-sft.yaml"), ("new/mine.yaml", "new/mine.yaml")],
)
def test_a_copy_lands_where_it_was_asked_to(destination: str, lands: str, place: Path) -> None:
    done = CliRunner().invoke(app, ["recipes", "copy", "reviews/sft", destination])
    assert done.exit_code == 0 and f"next: rlhf check {lands}" in done.output
    assert (place / lands).is_file()


@pytest.mark.usefixtures("recipe_file")
def test_check_says_what_would_run_and_what_is_ignored() -> None:
    done = run("check", "r.yaml", "run.name=y", "kl.beta=0.1")
    assert done.returncode == 0, done.stderr
    assert "runs/y-sft (3 steps, seed 42)" in done.stdout
    assert "gemma from scratch, 4 layers" in done.stdout
    assert "not read   reward, kl" in done.stdout
    assert "remark     data.eval is empty" in done.stdout
    assert "rows       data.train.0 rows.jsonl: 1 of 1 rows used as completion" in done.stdout
    assert done.stdout.endswith("The recipe is valid.\n")


@pytest.mark.usefixtures("recipe_file")
def test_check_refuses_rows_that_the_run_would_refuse() -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    done = run("check", "r.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("data.train.0: rows.jsonl: rows of format prompt (prompt) have no replies to imitate")
    assert "The recipe is valid." not in done.stdout


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_one_rank_speaks_for_all(rank: str, speaks: bool, place: Path) -> None:
    (place / "r.yaml").write_text(recipe(kl="kl: {betta: 1}"))
    done = run("train", "r.yaml", RANK=rank, **{spawn.EXIT_CODE_FILE: "said"})
    assert done.returncode == 2
    assert ("did you mean beta?" in done.stderr) == speaks
    assert (place / "said").exists() == speaks


@pytest.mark.parametrize("code", [ExitCode.USER, ExitCode.DIVERGED, ExitCode.PREEMPTED])
def test_a_user_error_leaves_its_code(
    code: ExitCode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("set it to 1", code)

    monkeypatch.setattr("rlhf.cli.app", fail)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == int(code)
    assert capsys.readouterr().err == "set it to 1\n"


class TestExitCode:
    """accelerate says 1 whatever happened; the truth is in a file or in run.json."""

    now = 1_800_000_000.0

    def record(self, folder: Path, code: int, ended: float) -> None:
        folder.mkdir()
        stamp = datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds")
        (folder / "run.json").write_text(json.dumps({"exit_code": code, "ended": stamp}))

    def test_what_rank_0_said_comes_first(self, tmp_path: Path) -> None:
        self.record(tmp_path / "r", 70, self.now + 1)
        (tmp_path / "said").write_text("75")
        assert spawn.exit_code(tmp_path / "said", tmp_path / "r", self.now, 1) == ExitCode.REWARD_GONE

    def test_then_the_newest_run_that_ended_since(self, tmp_path: Path) -> None:
        self.record(tmp_path / "r", 71, self.now - 1)  # an earlier run of the same recipe
        self.record(tmp_path / "r-2", 74, self.now + 1)
        self.record(tmp_path / "r-3", 70, self.now + 5)
        assert spawn.exit_code(tmp_path / "said", tmp_path / "r", self.now, 1) == ExitCode.DIVERGED

    @pytest.mark.parametrize(("launcher", "code"), [(0, ExitCode.DONE), (1, ExitCode.BUG), (-9, ExitCode.BUG)])
    def test_then_the_launcher(self, launcher: int, code: ExitCode, tmp_path: Path) -> None:
        self.record(tmp_path / "r", 70, self.now - 1)
        assert spawn.exit_code(tmp_path / "said", tmp_path / "r", self.now, launcher) == code


# A launcher like accelerate's: it starts `… rlhf …` in a session of its own and passes no SIGTERM on.
_LAUNCHER = """
import subprocess, sys
rank = "import pathlib, signal, sys, time\\n" \\
    "def save(*_): pathlib.Path('saved').write_text('x'); sys.exit(143)\\n" \\
    "signal.signal(signal.SIGTERM, save)\\n" \\
    "pathlib.Path('ready').write_text('x')\\n" \\
    "time.sleep(60)"
sys.exit(1 if subprocess.Popen([sys.executable, "-c", rank, "rlhf", "train"], start_new_session=True).wait() else 0)
"""


@pytest.mark.ranks
def test_a_signal_reaches_the_ranks_and_not_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = subprocess.Popen([sys.executable, "-c", _LAUNCHER], start_new_session=True)
    with spawn._forwarding(launcher):
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGTERM)
        assert launcher.wait(timeout=30) == 1  # by itself, after its rank
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_accelerate_configurations_are_found_and_hold_no_hyper_parameter() -> None:
    import yaml

    names = {
        "cpu",
        "cpu_2ranks",
        "cpu_2nodes",
        "cpu_zero2",
        "cpu_zero3",
        "cpu_fsdp2",
        "fsdp2",
        "single_gpu",
        "ddp",
        "zero1",
        "zero2",
        "zero3",
    }
    assert names | {"zero3_offload", "multi_node_zero3"} == set(shipped_accelerate_configs())
    by_path = accelerate_config_file("accelerate_configs/zero3.yaml")  # as in the README, from any folder
    assert accelerate_config_file("zero3").samefile(by_path)
    with pytest.raises(UserError, match="did you mean cpu_zero3"):
        accelerate_config_file("cpu_zero33")
    for name, file in shipped_accelerate_configs().items():
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert file.read_text(encoding="utf-8").startswith("# "), f"{name} says when to use it"
        assert settings["use_cpu"] == name.startswith("cpu")
        assert (settings["distributed_type"] == "DEEPSPEED") == ("zero" in name)
        assert (settings["distributed_type"] == "FSDP") == ("fsdp2" in name)
        deepspeed = settings.get("deepspeed_config", {})
        assert deepspeed.get("gradient_accumulation_steps", 1) == 1  # the recipe derives it
        forbidden = {"gradient_clipping", "train_batch_size", "optimizer", "train_micro_batch_size_per_gpu"}
        assert not forbidden & (set(settings) | set(deepspeed))


def test_gpu_configurations_are_refused_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="there is none here; use --accelerate cpu"):
        spawn._process_count(accelerate_config_file("zero3"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert spawn._process_count(accelerate_config_file("zero3")) == ["--num_processes", "4"]
    assert spawn._process_count(accelerate_config_file("single_gpu")) == ["--num_processes", "1"]
    assert spawn._process_count(accelerate_config_file("cpu_zero3")) == []
