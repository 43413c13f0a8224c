"""A run's directory: who may write in it, what is known about the run, and where it goes on after an interruption.

Rank 0 opens it; the other ranks are told the answer. A run directory holds ``recipe.yaml`` (resolved), ``run.json``,
``metrics.jsonl``, ``samples.jsonl``, ``checkpoints/``, ``final/`` and ``report.html``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TextIO

from rlhf.errors import ExitCode, UserError
from rlhf.runtime.checkpoint import (
    CheckpointInvalid,
    checkpoint_steps,
    newest_checkpoint,
    recover,
    step_directory,
)
from rlhf.runtime.manifest import library_versions, verify, write_json_atomic, write_text_atomic
from rlhf.tracking.redact import redact_text

RECIPE, RUN, CHECKPOINTS = "recipe.yaml", "run.json", "checkpoints"
LOGS = ("metrics.jsonl", "samples.jsonl")
Status = Literal["running", "finished", "failed", "preempted"]

ELSEWHERE = "rank "  # begins the reason where a process other than the main one failed
_OURS = (RUN, CHECKPOINTS, "final", "best", *LOGS)
_NO_STEP = -1  # rows of step 0 (the evaluation before training) survive a resume, but not a fresh start
_held: weakref.WeakSet[TextIO] = weakref.WeakSet()


class Failure(NamedTuple):
    """How a run ended: its exit code, and why in one line."""

    code: ExitCode
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """An open (locked) run directory.

    resume_from: checkpoint to load before the first step, None = from the beginning. finished: the same recipe has
    already run to its end here, there is nothing to do. notes: what the caller must tell the user, one line each
    (FRESH START, damaged checkpoints passed over or set aside, rows dropped).
    """

    path: Path
    resume_from: Path | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()
    lock: TextIO | None = field(default=None, repr=False, compare=False)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def read(self) -> dict[str, Any]:
        """The content of run.json."""
        return _read_json(self.path / RUN)

    def update(self, **fields: Any) -> None:
        """Adds or replaces top-level fields of run.json, atomically."""
        write_json_atomic(self.path / RUN, {**self.read(), **fields})

    def pin(self, hashes: Mapping[str, str]) -> None:
        """Records content hashes (policy, reference, reward model, tokenizer, data) at the first start.

        Raises UserError when a resumed run finds one changed: it would not be the same run.
        """
        known = self.read().get("hashes") or {}
        changed = sorted(name for name, value in hashes.items() if known.get(name, value) != value)
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed since {self.path} was started, so its checkpoints belong to other "
                "inputs; put the old content back, or start anew with run.resume=never"
            )
        self.update(hashes={**known, **hashes})

    def finish(self, status: Status, code: ExitCode, reason: str, *, step: int | None = None) -> None:
        """Records how the run ended. ``reason`` is one line; secrets are taken out of it."""
        done = {} if step is None else {"step": step}
        self.update(status=status, exit_code=int(code), exit_reason=redact_text(reason), ended=_now(), **done)

    def failed_elsewhere(self) -> Failure | None:
        """How another process of this run ended it, where one did."""
        record = self.read()
        reason = str(record.get("exit_reason") or "")
        if record.get("status") != "failed" or not reason.startswith(ELSEWHERE):
            return None
        return Failure(ExitCode(record["exit_code"]), reason)

    def close(self) -> None:
        """Lets another run use the directory."""
        if self.lock is not None and not self.lock.closed:
            fcntl.flock(self.lock, fcntl.LOCK_UN)  # also for a copy that a fork holds at this moment
            self.lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    output_dir: Path,
    resolved_recipe_yaml: str,
    differences: Callable[[str], list[str]],
    resume: Literal["auto", "never"] | str | Path,
    *,
    command: str | None = None,
) -> RunDirectory:
    """Creates or reopens a run directory and decides where the run starts.

    differences: given the recipe.yaml found there, the keys in which it differs from this recipe (empty = the same
    run). resume: ``auto`` goes on from the newest complete checkpoint or starts fresh; ``never`` starts anew, in
    ``<dir>-2``, ``-3`` … where the directory is in use; a path goes on from exactly that checkpoint. A finished run of
    the same recipe is never run again in place. command: what the user typed, for run.json (default: this process's).

    On resume the rows of metrics.jsonl and samples.jsonl past the checkpoint's step are dropped, and checkpoints newer
    than it are set aside (renamed, never deleted). Raises UserError (exit code 2) for a directory that cannot be
    written, is in use, holds something else or another recipe's run, and for a resume path that cannot be loaded.
    """
    explicit = None if resume in ("auto", "never") else _explicit(Path(resume))
    path = _claim_new(output_dir) if resume == "never" else output_dir
    lock = _lock(path)
    try:
        old = _existing_recipe(path)
        if old is not None:
            _require_same(path, differences(old))
            if _read_json(path / RUN).get("status") == "finished":
                note = f"{path} is finished: this recipe already ran to its end there; run.resume=never runs it anew"
                return RunDirectory(path=path, finished=True, notes=(note,), lock=lock)
        resume_from, step, notes = _start(path, explicit)
        _begin(path, resolved_recipe_yaml, None if resume_from is None else step, command)
        return RunDirectory(path=path, resume_from=resume_from, notes=notes, lock=lock)
    except BaseException as error:
        lock.close()
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error}); set run.output_dir to a writable place") from error
        raise


def keep_rows_until(path: Path, step: int) -> int:
    """Drops the rows of a .jsonl file whose ``step`` is larger, and broken lines (a killed writer leaves half of one).

    Atomic; a missing file is left missing. Returns how many rows were dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _row_step(line) <= step]
    if len(kept) < len(lines):
        write_text_atomic(path, b"".join(kept).decode())
    return len(lines) - len(kept)


def _row_step(line: bytes) -> float:
    try:
        return float(json.loads(line.decode())["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _explicit(path: Path) -> tuple[Path, int]:
    """The checkpoint a user named, and its step, checked in full before anything else happens."""
    try:
        return path, verify(path).step
    except (CheckpointInvalid, OSError) as error:
        inner = [found.path for found in map(newest_checkpoint, (path, path / CHECKPOINTS)) if found.path]
        hint = f"did you mean {inner[0]}?" if inner else "give a directory like RUN/checkpoints/step-00000100"
        raise UserError(f"run.resume={path} is no checkpoint that can be loaded: {error}; {hint}") from error


def _claim_new(wanted: Path) -> Path:
    """``wanted`` if there is nothing in it, else the first of wanted-2, wanted-3 … that is free."""
    number = 1
    path = wanted
    while path.exists() and not (path.is_dir() and not any(path.iterdir())):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def _lock(path: Path) -> TextIO:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{path} cannot be made or written ({error.strerror}); set run.output_dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()[:20] or "unknown"
        file.close()
        raise UserError(f"{path} is in use by another run (process {holder}); wait, or set run.name=") from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held.add(file)
    return file


def _release_in_child() -> None:
    """A forked worker that outlives us must not keep the directory locked."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_release_in_child)


def _existing_recipe(path: Path) -> str | None:
    """recipe.yaml of the run that lies here; None for a directory without one. Refuses somebody else's files."""
    try:
        return (path / RECIPE).read_text("utf-8")
    except FileNotFoundError:
        pass
    except UnicodeDecodeError as error:
        raise UserError(f"{path / RECIPE} is not UTF-8 text; move the directory away or set run.name=") from error
    found = [name for name in _OURS if (path / name).exists()]
    if found:
        raise UserError(f"{path} holds {found[0]} but no {RECIPE}, so it cannot be told whose it is; set run.name=")
    return None


def _require_same(path: Path, different: list[str]) -> None:
    if not different:
        return
    shown = ", ".join(different[:8]) + (f" and {len(different) - 8} more" if len(different) > 8 else "")
    raise UserError(
        f"{path} was made by another recipe: {shown} differ{'s' if len(different) == 1 else ''}; "
        f"give this run a name of its own with run.name=, or start anew with run.resume=never"
    )


def _start(path: Path, explicit: tuple[Path, int] | None) -> tuple[Path | None, int, tuple[str, ...]]:
    """Chooses the checkpoint, then makes the directory look as it did when that checkpoint was written."""
    root = path / CHECKPOINTS
    known = (path / RECIPE).exists()
    recover(root)
    chosen, notes = (explicit[0], ()) if explicit else newest_checkpoint(root)
    step = explicit[1] if explicit else _NO_STEP if chosen is None else int(chosen.name.removeprefix("step-"))
    aside = _set_aside(root, step, chosen)
    dropped = sum([keep_rows_until(path / name, step) for name in LOGS])
    if chosen is not None:
        headline = f"resuming from {chosen} (step {step})"
    else:
        headline = f"FRESH START: {'no checkpoint to go on from' if known else 'new run'} in {path}"
    tail = (f"dropped {dropped} logged rows past it",) if dropped else ()
    return chosen, step, (*notes, headline, *aside, *tail)


def _set_aside(root: Path, step: int, chosen: Path | None) -> tuple[str, ...]:
    """Renames checkpoints that this run will not have passed through; a later resume must not pick them."""
    notes = []
    for candidate in checkpoint_steps(root):
        path = step_directory(root, candidate)
        if candidate < step or (chosen is not None and path.resolve() == chosen.resolve()):
            continue
        number = 1
        while os.path.lexists(target := root / f"aside-{number}-{path.name}"):
            number += 1
        os.rename(path, target)
        notes.append(f"set aside {path.name} as {target}; delete it if it is not wanted")
    return tuple(notes)


def _begin(path: Path, recipe: str, resumed_step: int | None, command: str | None) -> None:
    """Writes recipe.yaml and run.json. What happened before an interruption stays in ``resumes``."""
    old = _read_json(path / RUN)
    now = _now()
    resumes = list(old.get("resumes", []))
    if resumed_step is not None:
        resumes.append({"step": resumed_step, "after": old.get("status"), "at": now})
    record = {
        "status": "running",
        "exit_code": None,
        "exit_reason": None,
        "step": resumed_step or 0,
        "started": old.get("started", now) if resumed_step is not None else now,
        "ended": None,
        "resumes": resumes,
        "command": redact_text(command if command is not None else _command()),
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "versions": {"python": platform.python_version(), **library_versions()},
        "commit": _commit(),
        "hashes": old.get("hashes", {}) if resumed_step is not None else {},
    }
    write_text_atomic(path / RECIPE, recipe)  # first: a directory with a run.json and no recipe would be nobody's
    write_json_atomic(path / RUN, record)


def _command() -> str:
    """What was typed, without the place where Python or the script is installed."""
    return shlex.join(["rlhf", *sys.argv[1:]])


def _commit() -> str | None:
    """Commit of this package's own checkout, with ``-dirty`` for local changes; None when it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
