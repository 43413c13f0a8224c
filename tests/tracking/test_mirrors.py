"""One run with every mirror, offline, in a process of its own; each is read back with its own reader."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.recipe import Recipe
from rlhf.tracking.mirror import Mirror
from rlhf.tracking.tracker import MIRRORS

ROOT = Path(__file__).parents[2]
BIN = Path(sysconfig.get_path("scripts"))

RUN = """
import json, sys
from pathlib import Path
from rlhf.tracking.tracker import build_tracker

Path("run").mkdir(exist_ok=True)
config = {"objective": "reinforce", "kl": {"beta": 0.1}, "reward": {"api_key": "canary"}}
to = ["wandb", "tensorboard", "trackio"]
tracker = build_tracker(Path("run"), to=to, project="p", run_name="n", config=config, main=True, total_steps=2)
for step in json.loads(sys.argv[1]):
    tracker.log(step, {"reward/score_mean": step / 4, "policy/loss": float("nan")})
    row = {"prompt": f"prompt {step}", "completion": "a|b\\x1b", "reward": 1.0, "scores": {"gold": 2.0}}
    tracker.samples(step, [row, {**row, "prompt": f"other {step}"}])
tracker.close("finished")
"""
SAMPLES = [(step, f"{name} {step}", r"a|b\x1b", 1.0, "gold=2.0") for step in (1, 2) for name in ("prompt", "other")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mirrors")
    done = run_in(place, sys.executable, "-W", "error::UserWarning", "-c", RUN, "[1, 2]")
    (folder,) = place.glob("run/wandb/offline-run-*")
    assert done.splitlines()[:3] == [
        f"wandb is offline (no WANDB_API_KEY); to upload this run: wandb sync run/wandb/{folder.name}",
        "tensorboard: tensorboard --logdir run/tensorboard",
        'trackio: trackio show --project "p"',
    ]
    assert "could not" not in done and "rackio" not in "".join(done.splitlines()[3:])
    yield place


def run_in(place: Path, *command: str | Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    own = {"PYTHONPATH": str(ROOT), "HOME": str(place), "OMP_NUM_THREADS": "1", "NETRC": "/dev/null"}
    done = subprocess.run(
        [str(word) for word in command],
        env={**kept, **own, "TRACKIO_DIR": str(place / "trackio")},
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def picked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("step", "prompt", "completion", "reward", "scores")) for row in rows]


def test_wandb_holds_metrics_recipe_and_every_step_of_the_table(place: Path) -> None:
    (folder,) = place.glob("run/wandb/offline-run-*")
    records = [
        json.loads(line)
        for line in run_in(place, BIN / "wandb", "leet", "inspect", "--json", folder).split("\n")
        if line
    ]
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    config = run["config"]["update"]
    assert (run["project"], run["display_name"]) == ("p", "n")
    assert (config["objective"], config["kl"], config["reward"]) == (
        "reinforce",
        {"beta": 0.1},
        {"api_key": "[redacted]"},
    )
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["_step"], row["reward/score_mean"], row["policy/loss"]) for row in history] == [
        (1, 0.25, "NaN"),
        (2, 0.5, "NaN"),
    ]
    assert {row["samples._type"] for row in history} == {"incremental-table-file"}
    tables = sorted(folder.glob("files/media/table/*.json"), key=lambda path: path.name.split("_")[1])
    assert len(tables) == 2
    rows = [dict(zip(t["columns"], row, strict=True)) for t in map(_json, tables) for row in t["data"]]
    assert picked(rows) == SAMPLES


def test_tensorboard_holds_metrics_recipe_and_samples(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/score_mean")] == [(1, 0.25), (2, 0.5)]
    assert all(math.isnan(event.value) for event in events.Scalars("policy/loss"))
    (recipe,) = _texts(events, "recipe")
    assert "      beta: 0.1" in recipe.splitlines() and "api_key: '[redacted]'" in recipe
    tables = _texts(events, "samples")
    assert [table.count("\n") for table in tables] == [3, 3]
    assert "| 1 |  | prompt 1 | a\\|b\\x1b | 1.0 |  |  | gold=2.0 |" in tables[0]
    assert "| 2 |  | other 2 |" in tables[1]


def test_trackio_holds_metrics_recipe_and_samples(place: Path) -> None:
    run = ("--project", "p", "--run", "n", "--json")
    told = json.loads(run_in(place, BIN / "trackio", "get", "run", *run))
    assert (told["last_step"], told["config"]["kl"], told["config"]["reward"]) == (
        2,
        {"beta": 0.1},
        {"api_key": "[redacted]"},
    )
    metric = json.loads(run_in(place, BIN / "trackio", "get", "metric", *run, "--metric", "reward/score_mean"))
    assert [(row["step"], row["value"]) for row in metric["values"]] == [(1, 0.25), (2, 0.5)]
    sql = "select metrics from metrics order by id"
    found = json.loads(run_in(place, BIN / "trackio", "query", "project", "--project", "p", "--sql", sql, "--json"))
    logged = [json.loads(row["metrics"]) for row in found["rows"]]
    assert picked([row for entry in logged if "samples" in entry for row in entry["samples"]["_value"]]) == SAMPLES


def test_no_secret_and_no_escape_is_written(place: Path) -> None:
    for path in place.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path
    assert not any(b"\x1b" in path.read_bytes() for path in place.rglob("*.json*"))


def test_a_resumed_run_goes_on_under_its_name(place: Path) -> None:
    """As after a kill in step 3: its row was dropped from metrics.jsonl, and step 3 comes again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_in(place, sys.executable, "-c", RUN, "[3]")
    path = place / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    run_in(place, sys.executable, "-c", RUN, "[3]")
    events = EventAccumulator(str(place / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/score_mean")] == [1, 2, 3]
    runs = json.loads(run_in(place, BIN / "trackio", "list", "runs", "--project", "p", "--json"))
    assert len(runs["runs"]) == 1
    ids = {path.name.rsplit("-", 1)[1] for path in place.glob("run/wandb/offline-run-*")}
    assert len(ids) == 1  # three folders of one run: syncing them gives one curve


class Broken:
    """A service whose server went away."""

    def __init__(self) -> None:
        self.abandoned = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("https://user:hunter2secret@host is gone")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        raise AssertionError("asked again after a failure")

    def close(self, status: str) -> None:
        raise AssertionError("asked again after a failure")

    def abandon(self) -> None:
        self.abandoned += 1


def test_a_failure_is_told_once_without_secrets_and_stops_nothing() -> None:
    service, said = Broken(), list[str]()
    mirror = Mirror("trackio", lambda: service, said.append)
    mirror.log(1, {"a": 1.0})
    mirror.log(2, {"a": 1.0})
    mirror.samples(2, [{}])
    mirror.close("finished")
    (line,) = said
    assert line.startswith("trackio could not log (ConnectionError: https://[redacted]@host is gone)")
    assert service.abandoned == 1


def test_a_missing_library_is_named_with_the_command_that_brings_it() -> None:
    def start() -> Broken:
        raise ModuleNotFoundError("No module named 'trackio'")

    said = list[str]()
    Mirror("trackio", start, said.append)
    assert said[0].endswith("the run goes on without it; pip install trackio")


def test_recipes_and_trackers_know_the_same_names() -> None:
    values = {"objective": "sft", "run": {"name": "x"}, "tracking": {"to": list(MIRRORS)}}
    assert Recipe.model_validate(values).tracking.to == MIRRORS


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _texts(events: Any, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]
