"""What every loop does around its steps: logs, checkpoints, the guard, and leaving in good order when told to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rlhf.errors import ExitCode, UserError
from rlhf.interfaces import TrainState
from rlhf.programs.alarms import Alarms
from rlhf.programs.keeper import Keeper
from rlhf.runtime import checkpoint as store
from rlhf.runtime import training_state
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.guard import Guard
from rlhf.runtime.rng import restore_rng, rng_tensors

FAILED_SAVES = 3


class Tracker(Protocol):
    """Where metrics and samples go; on ranks other than 0, nowhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Session:
    """The surroundings of one run's loop. root: the checkpoint folder. every_steps 0 = only at the end. kept: tensors
    by name that a checkpoint holds beside weights and optimizer, the same on every rank; resuming writes into them."""

    runtime: Runtime
    tracker: Tracker
    root: Path
    every_steps: int
    keep: int
    max_seconds: float | None = None
    guard: Guard = field(default_factory=Guard)
    keeper: Keeper | None = None
    kept: dict[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    alarms: Alarms = field(default_factory=Alarms)
    last_step: int = 0
    started: float = field(default_factory=time.monotonic)
    signals: list[int] = field(default_factory=list)
    failed_saves: int = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.last_step = step
        self.tracker.log(step, metrics)
        for line in self.alarms.see(step, metrics):
            self.note(line)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs held-out metrics, the same on every rank, and keeps the weights where they are the best so far."""
        self.log(step, metrics)
        if self.keeper is not None:
            self.keeper.see(step, metrics)

    def note(self, text: str) -> None:
        """One line for the person at the terminal."""
        self.tracker.note(text)

    def samples(self, step: int, rows: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """Rows are made on rank 0 only."""
        if self.runtime.main:
            self.tracker.samples(step, rows())

    def checkpoint(self, step: int, state: TrainState, model: nn.Module, optimizer: Any, *, last: bool) -> None:
        """Saves when due, at the last step, and when a signal asks the run to stop.

        Raises UserError with code 143 after the save a signal asked for, 74 after three failed saves in a row.
        """
        stop, late = self._told_to_stop()
        if stop or last or (self.every_steps and step % self.every_steps == 0):
            self._save(step, state, model, optimizer)
        if stop and not last:
            why = f"run.max_seconds={self.max_seconds:g} have passed" if late else "a signal asked for it"
            raise UserError(
                f"stopped after step {step}: {why}; the same command goes on from there", ExitCode.PREEMPTED
            )

    @contextmanager
    def rescue(self, state: TrainState, model: nn.Module, optimizer: Any) -> Iterator[None]:
        """Where the reward source is gone for good, saves the last whole step, so that no more than this one is lost.
        Every rank hears of it (``ServerReward.score``), so all of them take part."""
        try:
            yield
        except UserError as error:
            if error.code == ExitCode.REWARD_GONE and state.step > 0:
                self._save(state.step, state, model, optimizer)
            raise

    def resume(self, path: Path, model: nn.Module, optimizer: Any) -> TrainState:
        """Loads weights, optimizer, RNG and state of a checkpoint that was verified file by file."""
        loaded = store.load_checkpoint(path)
        training_state.restore(self.runtime, model, optimizer, loaded.files)
        restore_rng(loaded.files["rng"])
        for name, tensors in self.kept.items():
            for key, value in tensors.items():
                value.copy_(loaded.files[name][key])
        return TrainState.from_json(loaded.state["train"])

    def _save(self, step: int, state: TrainState, model: nn.Module, optimizer: Any) -> None:
        files = training_state.collect(self.runtime, model, optimizer)
        failure = ""
        if self.runtime.main:
            try:
                content = {**files, **self.kept, "rng": rng_tensors()}
                store.save_checkpoint(self.root, step, content, {"train": state.to_json()}, keep=self.keep)
                self.failed_saves = 0
            except store.CheckpointFailed as error:
                self.failed_saves += 1
                failure = str(error)
                self.tracker.note(failure)
        over = torch.tensor(self.failed_saves, device=self.runtime.device)
        if int(self.runtime.max(over)) >= FAILED_SAVES:
            raise UserError(f"{FAILED_SAVES} checkpoints in a row could not be written: {failure}", ExitCode.DISK)

    def _told_to_stop(self) -> tuple[bool, bool]:
        """(stop, because time is up), agreed over ranks, so that all of them stop at the same step."""
        late = self.max_seconds is not None and time.monotonic() - self.started > self.max_seconds
        flags = torch.tensor([bool(self.signals), late], dtype=torch.long, device=self.runtime.device)
        signalled, late_anywhere = self.runtime.max(flags).tolist()
        return bool(signalled or late_anywhere), bool(late_anywhere)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT are noted, and acted on after the step; a second SIGINT interrupts at once."""

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.signals:
                raise KeyboardInterrupt
            self.signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
