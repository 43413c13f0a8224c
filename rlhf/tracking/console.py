"""Progress on the terminal: a bar with the few numbers that matter, or plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from rlhf.tracking.redact import printable

__all__ = ["ConsoleProgress", "printable", "summary"]

KEY_METRICS = (  # shown in this order, at most SHOWN of those that a step has
    ("reward/score_mean", "reward"),
    ("reward/gold_mean", "gold"),
    ("kl/reference", "KL"),
    ("completion/length_mean", "length"),
    ("loss/sft", "loss"),
    ("loss/reward", "loss"),
    ("reward_model/accuracy", "accuracy"),
    ("policy/pair_accuracy", "pair accuracy"),
    ("policy/pair_margin", "margin"),
    ("eval/loss", "held-out loss"),
    ("eval/accuracy", "held-out accuracy"),
    ("eval/reward_mean", "held-out reward"),
    ("eval/gold_mean", "held-out gold"),
    ("eval/kl_reference", "held-out KL"),
)
SHOWN = 4
_SAMPLE_WIDTH = 160


class ConsoleProgress:
    """Rank 0's view of a run.

    On a terminal a progress bar with time left; elsewhere one plain line for the first step, the last one, and
    whenever ``every_seconds`` have passed; one sample per ``samples_seconds``, its control characters spelled out.
    total_steps None = not known yet.
    """

    def __init__(
        self,
        total_steps: int | None,
        *,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        samples_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._clock = clock
        self._every = every_seconds
        self._samples_every = samples_seconds
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._progress = _bar(self._console) if self._console.is_terminal else None
        self._task: TaskID | None = None
        self._first: tuple[int, float] | None = None
        self._last_line = self._last_sample = float("-inf")

    def note(self, text: str) -> None:
        """One message of ours or of a library, above the bar."""
        self._console.print(Text(printable(text)))

    def set_total(self, steps: int) -> None:
        self._total = steps
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=steps)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        if self._progress is not None:
            self._advance(self._progress, step, summary(metrics))
        elif self._last(step) or now - self._last_line >= self._every:
            self._last_line = now
            of = "" if self._total is None else f"/{self._total}"
            self.note(f"step {step}{of}  {summary(metrics)}{self._time_left(step, now)}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Now and then shows the first row on two lines."""
        now = self._clock()
        if not rows or now - self._last_sample < self._samples_every:
            return
        self._last_sample = now
        row = rows[0]
        self.note(f"  step {step} prompt: {_short(row.get('prompt'))}")
        self.note(f"  {_number('reward', row.get('reward'))} completion: {_short(row.get('completion'))}")

    def close(self, status: str) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _advance(self, progress: Progress, step: int, text: str) -> None:
        if self._task is None:  # starting at step - 1, a resumed run does not look infinitely fast
            self._task = progress.add_task("", total=self._total, completed=max(step - 1, 0), metrics="")
            progress.start()
        progress.update(self._task, completed=step, metrics=text)

    def _last(self, step: int) -> bool:
        return self._total is not None and step >= self._total

    def _time_left(self, step: int, now: float) -> str:
        first_step, first_time = self._first or (step, now)
        if step <= first_step or self._total is None or step >= self._total:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return f"  {_duration(seconds)} left"


def summary(metrics: Mapping[str, float]) -> str:
    """The key metrics of a step on part of a line: ``reward 1.23  KL 0.456``."""
    known = [_number(label, metrics[key]) for key, label in KEY_METRICS if key in metrics]
    return "  ".join(known[:SHOWN])


def _bar(console: Console) -> Progress:
    columns = (TextColumn("step"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[metrics]}", markup=False), console=console)


def _number(label: str, value: Any) -> str:
    try:
        return f"{label} {float(value):.4g}"
    except (TypeError, ValueError):
        return f"{label} ?"


def _short(text: Any) -> str:
    shown = printable(str(text), newlines=False)
    return shown if len(shown) <= _SAMPLE_WIDTH else shown[: _SAMPLE_WIDTH - 1] + "…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
