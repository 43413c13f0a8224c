"""wandb really runs here, offline, in a process of its own: it starts helper processes and exit hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.tracking.tracker import Tracker, build_tracker

ROOT = Path(__file__).parents[2]

RUN = """
import os, signal, sys
from pathlib import Path
from rlhf.tracking.tracker import build_tracker

def helpers(parent):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found += [int(entry.name), *helpers(int(entry.name))]
        except OSError:
            pass
    return found

run = Path("run")
config = {"objective": "reinforce", "reward": {"api_key": "canary"}}
tracker = build_tracker(run, to=["wandb"], project="p", run_name="n", config=config, main=True, total_steps=3)
for step in (1, 2, 3):
    tracker.log(step, {"reward/score_mean": step / 4, "policy/loss": float("nan")})
    row = {"prompt": f"prompt {step}", "completion": "<b>\\x1b", "reward": 1.0, "scores": {"gold": 2.0}}
    tracker.samples(step, [row])
    if sys.argv[1] == "kill" and step == 1:
        for helper in helpers(os.getpid()):
            os.kill(helper, signal.SIGKILL)
tracker.close("finished")
"""


def run_with_wandb(place: Path, how: str) -> tuple[str, Path]:
    """Runs three steps; returns what was printed and the run directory."""
    (place / "run").mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HOME": str(place), "OMP_NUM_THREADS": "1", "NETRC": "/dev/null"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", RUN, how]
    done = subprocess.run(
        command, env=environment, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert len((place / "run" / "samples.jsonl").read_text().splitlines()) == 3
    return done.stdout, place / "run"


def test_wandb_runs_offline_says_how_to_sync_and_shows_every_sample(tmp_path: Path) -> None:
    printed, run = run_with_wandb(tmp_path, "whole")
    (folder,) = run.glob("wandb/offline-run-*")
    (line,) = [line for line in printed.splitlines() if "wandb" in line]
    assert line == (f"wandb is offline (no WANDB_API_KEY); to upload this run: wandb sync run/wandb/{folder.name}")
    tables = [json.loads(path.read_text()) for path in folder.glob("files/media/table/*.json")]
    cells = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert sorted((cell["step"], cell["prompt"], cell["scores"]) for cell in cells) == [
        (step, f"prompt {step}", "gold=2.0") for step in (1, 2, 3)
    ]
    everything = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"reward/score_mean" in next(folder.glob("*.wandb")).read_bytes()
    assert b"canary" not in everything and b"\x1b" not in b"".join(json.dumps(table).encode() for table in tables)


def test_the_death_of_wandbs_helpers_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    printed, _ = run_with_wandb(tmp_path, "kill")
    assert len([line for line in printed.splitlines() if "the run goes on without it" in line]) == 1
    assert "step 3/3" in printed


def test_a_wandb_that_cannot_start_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb now raises ImportError
    tracker = build_tracker(tmp_path, to=["wandb"], project="p", run_name="n", config={}, main=True, total_steps=1)
    tracker.log(1, {"policy/loss": 0.5})
    tracker.samples(1, [{"prompt": "p"}])
    tracker.close("failed")
    printed = capsys.readouterr().out
    assert printed.count("wandb") <= 3 and printed.count("the run goes on without it") == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "policy/loss": 0.5}


def test_other_ranks_track_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = build_tracker(tmp_path, to=["wandb"], project="p", run_name="n", config={}, main=False, total_steps=1)
    tracker.set_total(3)
    tracker.note("nothing")
    tracker.log(1, {"a": 1.0})
    tracker.samples(1, [{}])
    tracker.close("finished")
    assert tracker == Tracker() and list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_an_unknown_mirror_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.to names 'wanddb'.*known: wandb, tensorboard, trackio"):
        build_tracker(tmp_path, to=["wanddb"], project="p", run_name="n", config={}, main=True, total_steps=1)


def test_messages_and_steps_go_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = build_tracker(tmp_path, to=[], project="p", run_name="n", config={}, main=True, total_steps=None)
    tracker.set_total(2)
    tracker.note("two ranks")
    tracker.log(2, {"kl/reference": 0.5})
    tracker.close("finished")
    assert capsys.readouterr().out.splitlines() == ["two ranks", "step 2/2  KL 0.5"]
