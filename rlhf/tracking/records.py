"""metrics.jsonl and samples.jsonl: the record of a run that everything else mirrors or reads.

One JSON object a line, flushed at once, so that a killed run has all its rows but at most half of the last. Everything
outside printable ASCII is escaped: a completion shown with ``cat`` cannot drive the terminal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rlhf.errors import ExitCode, UserError

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
NON_FINITE = "_non_finite"


class JsonLines:
    """An append-only file of JSON objects. Call :meth:`close` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_for_append(path)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line a row and hands them to the operating system.

        Numbers that JSON lacks become null, and the row says so under ``_non_finite``: {"policy/loss": "nan"}.
        Raises UserError (exit code 74) when the disk is full.
        """
        try:
            self._file.writelines(_line(row) for row in rows)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error}; free some disk space", ExitCode.DISK) from error

    def close(self) -> None:
        self._file.close()


class MetricsLog(JsonLines):
    """``metrics.jsonl``: one line a step, {"step": 3, "policy/loss": 0.25, …}."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / METRICS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: numbers by name; 0-dimensional tensors and numpy numbers are taken as floats."""
        self.write([{"step": step, **metrics}])


class SamplesLog(JsonLines):
    """``samples.jsonl``: rows {"step", "phase", "prompt", "completion", "reward", "kl", "finished", "scores"}."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / SAMPLES)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.write([{**row, "step": step} for row in rows])


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a .jsonl file and how many lines were passed over as broken. A missing file has no rows."""
    rows, broken = [], 0
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken += bool(line.strip())
    return rows, broken


def _open_for_append(path: Path) -> TextIO:
    """Ends a line that a killed writer left open, so that the next row is not glued to it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return os.fdopen(descriptor, "a", encoding="ascii")


def _line(row: Mapping[str, Any]) -> str:
    notes: dict[str, str] = {}
    plain = {key: _plain(value, key, notes) for key, value in row.items()}
    if notes:
        plain[NON_FINITE] = notes
    return json.dumps(plain, allow_nan=False) + "\n"


def _plain(value: Any, where: str, notes: dict[str, str]) -> Any:
    """Plain JSON values; ``notes`` collects what had to become null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", notes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}.{index}", notes) for index, item in enumerate(value)]
    number = value if isinstance(value, float) else value.item()  # a tensor or numpy number of one element
    if isinstance(number, float) and not math.isfinite(number):
        notes[where] = str(number)
        return None
    return number
