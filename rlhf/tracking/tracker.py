"""The one object that the loops log to: files first, then the terminal, then mirrors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.errors import UserError
from rlhf.tracking.console import ConsoleProgress
from rlhf.tracking.mirror import Mirror, Service
from rlhf.tracking.records import METRICS, MetricsLog, SamplesLog, read_rows

MIRRORS = ("wandb", "tensorboard", "trackio")


class Sink(Protocol):
    """One place that a run is shown or recorded in."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of one step."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions with their rewards, as rows of samples.jsonl."""

    def close(self, status: str) -> None:
        """status: finished, failed or preempted."""


@dataclass(frozen=True)
class Tracker:
    """Passes everything on to its sinks, in order. Without sinks (ranks other than 0) it does nothing."""

    sinks: tuple[Sink, ...] = ()
    console: ConsoleProgress | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for sink in self.sinks:
            sink.samples(step, rows)

    def note(self, text: str) -> None:
        """One message for the user, shown above the progress bar on rank 0."""
        if self.console is not None:
            self.console.note(text)

    def set_total(self, steps: int) -> None:
        """How many steps the run has, once that is known."""
        if self.console is not None:
            self.console.set_total(steps)

    def close(self, status: str) -> None:
        """status: finished, failed or preempted, as in run.json."""
        for sink in self.sinks:
            sink.close(status)


class Records:
    """metrics.jsonl and samples.jsonl as one sink."""

    def __init__(self, run: Path) -> None:
        self._metrics = MetricsLog(run)
        self._samples = SamplesLog(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.log(step, metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._samples.samples(step, rows)

    def close(self, status: str) -> None:
        self._metrics.close()
        self._samples.close()


def build_tracker(
    run_dir: Path,
    *,
    to: Sequence[str],
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    main: bool,
    total_steps: int | None,
) -> Tracker:
    """The tracker of this process; a null one where ``main`` is False.

    to: mirrors besides the run's own files and the terminal. config: the resolved recipe, redacted before it is sent.
    Raises UserError for a mirror that does not exist, on every rank.
    """
    unknown = [name for name in to if name not in MIRRORS]
    if unknown:
        raise UserError(f"tracking.to names {unknown[0]!r}, which is unknown; known: {', '.join(MIRRORS)}")
    if not main:
        return Tracker()
    rows = read_rows(run_dir / METRICS)[0]
    last_step = rows[-1]["step"] if rows else None
    console = ConsoleProgress(total_steps)
    mirrors = [
        Mirror(name, _service(name, run_dir, project, run_name, config, console.note, last_step), console.note)
        for name in dict.fromkeys(to)
    ]
    return Tracker((Records(run_dir), console, *mirrors), console)


def _service(
    name: str,
    run: Path,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    note: Callable[[str], None],
    last_step: int | None,
) -> Callable[[], Service]:
    """What starts the tracker of this name. Each library is loaded only where it is asked for."""

    def wandb() -> Service:
        from rlhf.tracking.wandb import Wandb

        fresh = last_step is None
        return Wandb(run, project=project, run_name=run_name, config=config, note=note, fresh=fresh)

    def tensorboard() -> Service:
        from rlhf.tracking.tensorboard import TensorBoard

        return TensorBoard(run, config=config, note=note, last_step=last_step)

    def trackio() -> Service:
        from rlhf.tracking.trackio import Trackio

        return Trackio(project=project, run_name=run_name, config=config, note=note, fresh=last_step is None)

    return {"wandb": wandb, "tensorboard": tensorboard, "trackio": trackio}[name]
