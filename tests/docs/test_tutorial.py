"""The tutorial, typed as it stands: its files, its commands, in their order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf.cli import app

from .test_docs import blocks

PAGE = "docs/tutorial.md"
NOT_HERE = ("make ", "source ", "rlhf train shop-sft.yaml policy.scratch=null")  # set-up, and a model from the hub


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(PAGE, "bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(NOT_HERE)]


def follow(folder: Path, *overrides: str) -> None:
    """Writes the page's files and runs its commands, with ``overrides`` behind each `rlhf train`."""
    for block in blocks(PAGE, "python", "yaml"):
        name = re.match(r"# ([\w-]+\.(?:py|yaml))\n", block)
        assert name, "a block of a file starts with its name"
        (folder / name[1]).write_text(block, encoding="utf-8")
    for line in commands():
        words = shlex.split(line)
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True)
            continue
        assert words[0] == "rlhf", line
        done = CliRunner().invoke(app, [*words[1:], *(overrides if words[1] == "train" else ())])
        assert done.exit_code == 0, f"{line}\n{done.output[-3000:]}"


def test_every_command_of_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a training: what is tested is the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop_rewards", raising=False)
    follow(tmp_path, "run.steps=2", "eval.samples=8", "rollout.max_new_tokens=16")
    told = json.loads((tmp_path / "runs" / "shop-brief-reinforce" / "run.json").read_text(encoding="utf-8"))
    assert told["status"] == "finished"


@pytest.mark.slow  # minutes: the trainings as they are written
def test_the_tutorial_teaches_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.programs.outcome import outcome

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop_rewards", raising=False)
    follow(tmp_path)
    first, brief = (outcome(tmp_path / "runs" / f"{name}-reinforce") for name in ("shop", "shop-brief"))
    assert first is not None and brief is not None
    reward, tokens = first.changes["reward"], first.changes["tokens"]
    assert reward.difference > 5 * reward.error
    assert tokens.difference > 2  # 15 to 20: longer replies, which the annotators like
    assert brief.changes["tokens"].after < tokens.after - 2  # 17
