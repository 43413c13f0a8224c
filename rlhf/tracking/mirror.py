"""What the mirrors of a run's own records share: nothing that one does or fails to do can stop a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rlhf.tracking.redact import printable, redact_text

COLUMNS = ("step", "phase", "prompt", "completion", "reward", "kl", "finished", "scores")


class Service(Protocol):
    """A tracker as it is: every method may raise."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions with their rewards, as rows of samples.jsonl."""

    def close(self, status: str) -> None:
        """status: finished, failed or preempted."""

    def abandon(self) -> None:
        """Lets go of helpers that would speak up when the process ends."""


class Mirror:
    """A service that can only warn: its first failure is told once, after it the mirror is silent."""

    def __init__(self, name: str, start: Callable[[], Service], note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._service: Service | None = None
        try:
            self._service = start()
        except Exception as error:
            self._give_up("start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try("log", lambda service: service.log(step, metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._try("log samples", lambda service: service.samples(step, rows))

    def close(self, status: str) -> None:
        self._try("finish", lambda service: service.close(status))
        self._service = None

    def _try(self, what: str, action: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            action(self._service)
        except Exception as error:  # a helper process may have died, the disk be full, the network gone
            self._give_up(what, error)

    def _give_up(self, what: str, error: Exception) -> None:
        service, self._service = self._service, None
        advice = f"; pip install {self._name}" if isinstance(error, ImportError) else ""
        self._note(f"{self._name} could not {what} ({brief(error)}); the run goes on without it{advice}")
        if service is not None:
            with suppress(Exception):
                service.abandon()


def brief(error: Exception) -> str:
    """An error on part of a line, without secrets."""
    return redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def cells(row: Mapping[str, Any]) -> list[Any]:
    """A row of samples.jsonl as the cells of COLUMNS; control characters of model text are spelled out."""
    scores = row.get("scores") or {}
    texts = {"prompt": printable(str(row.get("prompt", ""))), "completion": printable(str(row.get("completion", "")))}
    shown = {**row, **texts, "scores": "  ".join(f"{name}={value}" for name, value in scores.items())}
    return [shown.get(column) for column in COLUMNS]


def relative(path: Path) -> str:
    """A place as short as it can be typed from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
