from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import ExitCode, UserError
from rlhf.runtime.checkpoint import save_checkpoint
from rlhf.runtime.run_dir import RunDirectory, keep_rows_until, open_run

RECIPE = "objective: reinforce\nrun: {name: a}\n"


def open_(path: Path, recipe: str = RECIPE, resume: Any = "auto", **options: Any) -> RunDirectory:
    return open_run(path, recipe, lambda old: [] if old == recipe else ["kl.beta", "optim.lr"], resume, **options)


def save(run: RunDirectory, step: int) -> Path:
    return save_checkpoint(run.checkpoints, step, {"model": {"w": torch.ones(2)}}, {}, keep=9)


def log(run: RunDirectory, steps: range) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run.path / name).open("a") as file:
            file.writelines(json.dumps({"step": step, "x": step / 3}) + "\n" for step in steps)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def interrupted(path: Path, last: int = 7, saved: tuple[int, ...] = (2, 4)) -> RunDirectory:
    with open_(path) as run:
        log(run, range(0, last + 1))
        for step in saved:
            save(run, step)
    return run


def test_a_new_directory_is_private_and_says_what_ran(tmp_path: Path) -> None:
    with open_(tmp_path / "runs" / "a", command="rlhf train a.yaml") as run:
        assert run.resume_from is None and not run.finished
        assert run.notes == (f"FRESH START: new run in {run.path}",)
        assert (run.path / "recipe.yaml").read_text() == RECIPE
        record = run.read()
    assert record["status"] == "running" and record["command"] == "rlhf train a.yaml"
    assert set(record["versions"]) >= {"python", "torch", "safetensors"}
    assert os.uname().nodename not in json.dumps(record)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE((run.path / name).stat().st_mode) for name in ("recipe.yaml", "run.json")} == {0o600}


def test_secrets_on_the_command_line_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_TOKEN", "canary-in-the-environment")
    command = "rlhf train r.yaml reward.api_key=canary1 u=https://me:canary2@host hf_canaryCANARYcanary"
    command += " canary-in-the-environment"
    with open_(tmp_path / "a", command=command) as run:
        run.finish("failed", ExitCode.BUG, "token=canary3")
        assert "canary" not in (run.path / "run.json").read_text().lower()


def test_the_end_is_recorded(tmp_path: Path) -> None:
    with open_(tmp_path / "a") as run:
        run.update(summary={"gold": {"before": 1.0, "after": 2.0}})
        run.finish("failed", ExitCode.DIVERGED, "diverged: 5 steps in a row", step=3)
        record = run.read()
    assert (record["status"], record["exit_code"], record["step"]) == ("failed", 70, 3)
    assert record["exit_reason"] == "diverged: 5 steps in a row" and record["summary"]["gold"]["after"] == 2.0


def test_auto_resumes_from_the_newest_checkpoint_and_forgets_what_came_after_it(tmp_path: Path) -> None:
    interrupted(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "x": 0.')  # killed in the middle of a line
    before = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open_(tmp_path / "a") as run:
        assert run.resume_from == run.checkpoints / "step-00000004"
        assert (run.path / "metrics.jsonl").read_text() == "".join(before[:5])
        assert steps(run.path / "samples.jsonl") == [0, 1, 2, 3, 4]
        assert any("dropped 7 logged rows" in note for note in run.notes)  # 5, 6, 7 twice, and half a line
        assert run.read()["resumes"][0]["step"] == 4


def test_auto_with_only_damaged_checkpoints_starts_fresh_and_says_so(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "a", saved=(2,))
    (run.checkpoints / "step-00000002" / "model.safetensors").write_bytes(b"")
    with open_(tmp_path / "a") as run:
        assert run.resume_from is None
        told = "\n".join(run.notes)
        assert "model.safetensors" in told and "FRESH START: no checkpoint to go on from" in told
        assert "set aside step-00000002" in told
        assert steps(run.path / "metrics.jsonl") == []
        save(run, 2)  # the damaged one is not in the way


def test_auto_falls_back_to_the_checkpoint_before_the_damaged_one(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "a")
    (run.checkpoints / "step-00000004" / "state.json").unlink()
    with open_(tmp_path / "a") as run:
        assert run.resume_from == run.checkpoints / "step-00000002"
        assert steps(run.path / "metrics.jsonl") == [0, 1, 2]
        assert "state.json" in run.notes[0]


def test_what_a_killed_save_left_is_cleared_at_the_start(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "a")
    staging = run.checkpoints / ".staging-step-00000006-0123abcd"
    staging.mkdir()
    with open_(tmp_path / "a"):
        assert not staging.exists()


def test_an_explicit_checkpoint_rewinds_the_run_without_deleting_anything(tmp_path: Path) -> None:
    run = interrupted(tmp_path / "a")
    with open_(tmp_path / "a", resume=run.checkpoints / "step-00000002") as run:
        assert run.resume_from == run.checkpoints / "step-00000002"
        assert steps(run.path / "metrics.jsonl") == [0, 1, 2]
        assert sorted(p.name for p in run.checkpoints.iterdir()) == ["aside-1-step-00000004", "step-00000002"]


def test_a_checkpoint_of_another_directory_starts_a_new_one(tmp_path: Path) -> None:
    other = interrupted(tmp_path / "a").checkpoints / "step-00000002"
    with open_(tmp_path / "b", resume=str(other)) as run:
        assert run.resume_from == other


def broken_targets(root: Path) -> dict[str, Path]:
    run = interrupted(root / "other", saved=(1,))
    (root / "empty").mkdir()
    (root / "file").write_text("step-00000001")
    (root / "staging" / ".staging-step-00000001-0123abcd").mkdir(parents=True)
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").touch()
    (root / "link").symlink_to(run.checkpoints / "step-00000001")
    names = ("missing", "empty", "file", "staging", "model", "link")
    return {**{name: root / name for name in names}, "run directory": run.path, "checkpoints": run.checkpoints}


def test_a_resume_path_that_cannot_be_loaded_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    for name, target in broken_targets(tmp_path).items():
        with pytest.raises(UserError, match=r"run\.resume=") as caught:
            open_(tmp_path / "new", resume=target)
        assert caught.value.code == ExitCode.USER
        assert not (tmp_path / "new").exists(), name
        if name in ("run directory", "checkpoints"):
            assert "did you mean" in str(caught.value) and "step-00000001" in str(caught.value)


def test_a_finished_run_of_the_same_recipe_says_so(tmp_path: Path) -> None:
    with open_(tmp_path / "a") as run:
        run.finish("finished", ExitCode.DONE, "done", step=7)
    recorded = (run.path / "run.json").read_bytes()
    with open_(tmp_path / "a") as again:
        assert again.finished and "is finished" in again.notes[0]
    assert (run.path / "run.json").read_bytes() == recorded


@pytest.mark.parametrize("status", ["finished", "failed", None])
def test_a_run_of_another_recipe_is_refused_and_left_alone(tmp_path: Path, status: Any) -> None:
    with open_(tmp_path / "a") as run:
        log(run, range(3))
        if status:
            run.finish(status, ExitCode.DONE, "")
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file() and path.name != ".lock"}
    for resume in ("auto", interrupted(tmp_path / "b").checkpoints / "step-00000002"):
        with pytest.raises(UserError, match=r"another recipe: kl\.beta, optim\.lr differ; .*run\.name=") as caught:
            open_(tmp_path / "a", "objective: dpo\n", resume=resume)
        assert caught.value.code == 2
    assert {name: (run.path / name).read_bytes() for name in before} == before


def test_never_starts_anew_beside_what_exists(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        with open_(tmp_path / "a", resume="never") as run:
            paths.append(run.path.name)
            assert run.resume_from is None
    assert paths == ["a", "a-2", "a-3"]
    (tmp_path / "empty").mkdir()
    with open_(tmp_path / "empty", resume="never") as run:
        assert run.path.name == "empty"


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open_(tmp_path / "a") as run:
        recorded = (run.path / "run.json").read_bytes()
        holder = str(os.getpid())
        second = os.fork()
        if second == 0:
            try:
                open_(tmp_path / "a")
            except UserError as error:
                os.write(writer, str(error).encode())
                os._exit(error.code)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == ExitCode.USER
        assert f"in use by another run (process {holder})" in os.read(reader, 1000).decode()
        assert (run.path / "run.json").read_bytes() == recorded
        with pytest.raises(UserError, match="in use"):
            open_(tmp_path / "a")
    with open_(tmp_path / "a"):
        pass
    for descriptor in (reader, writer):
        os.close(descriptor)


def test_a_forked_worker_does_not_keep_the_directory_locked(tmp_path: Path) -> None:
    """As after kill -9: the parent's descriptor is gone, unlocked by nobody, while the worker lives on."""
    alive, started = os.pipe(), os.pipe()
    run = open_(tmp_path / "a")
    worker = os.fork()
    if worker == 0:
        os.close(alive[1])
        os.write(started[1], b"x")
        os.read(alive[0], 1)  # until the parent is done with the second opening
        os._exit(0)
    os.read(started[0], 1)
    assert run.lock is not None
    run.lock.close()
    with open_(tmp_path / "a") as again:
        assert again.path == run.path
    for descriptor in (*alive, *started):
        os.close(descriptor)
    os.waitpid(worker, 0)


def under_a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file" / "a"


def a_file(root: Path) -> Path:
    (root / "file").touch()
    return root / "file"


def somebodys(root: Path) -> Path:
    (root / "x" / "checkpoints").mkdir(parents=True)
    return root / "x"


@pytest.mark.parametrize("place", [under_a_file, a_file, somebodys])
def test_a_place_where_no_run_can_be_is_refused(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    with pytest.raises(UserError) as caught:
        open_(place(tmp_path))
    assert caught.value.code == 2 and "run." in str(caught.value)


def test_a_directory_with_other_files_is_taken(tmp_path: Path) -> None:
    """``rlhf train … | tee runs/a/log.txt`` makes the directory first."""
    (tmp_path / "log.txt").touch()
    with open_(tmp_path) as run:
        assert (run.path / "run.json").exists()


def test_changed_inputs_are_refused_at_resume(tmp_path: Path) -> None:
    with open_(tmp_path / "a") as run:
        run.pin({"policy": "1", "reference": "2"})
        save(run, 1)
    with open_(tmp_path / "a") as run:
        run.pin({"policy": "1", "tokenizer": "3"})
        with pytest.raises(UserError, match="reference changed"):
            run.pin({"policy": "1", "reference": "9"})
        assert run.read()["hashes"] == {"policy": "1", "reference": "2", "tokenizer": "3"}


def test_keep_rows_until_drops_later_and_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_rows_until(path, 3) == 0 and not path.exists()
    good = b'{"step": 1}\n{"step": 3, "x": null}\n'
    path.write_bytes(good + b'{"step": 4}\n\n{"x": 1}\n[]\n\xff\n{"step": 2}')
    assert keep_rows_until(path, 3) == 6
    assert path.read_bytes() == good
    assert keep_rows_until(path, 3) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
