"""trackio, a dashboard on this machine (``trackio show``), through accelerate's tracker."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rlhf.tracking.mirror import COLUMNS, cells
from rlhf.tracking.redact import redact


class Trackio:
    """Metrics, the resolved recipe as configuration, and every step's samples as a table.

    The data base is trackio's own (``TRACKIO_DIR``), so that all runs of a project are on one page. fresh: a run that
    is resumed goes on under its name instead of starting another one.
    """

    def __init__(
        self, *, project: str, run_name: str, config: Mapping[str, Any], note: Callable[[str], None], fresh: bool
    ) -> None:
        from accelerate.tracking import TrackioTracker

        self._tracker = TrackioTracker(
            project,  # accelerate calls it run_name and hands it to trackio as the project
            name=run_name,
            config=redact(dict(config)),
            resume="never" if fresh else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        with _quiet():
            self._tracker.start()
        note(f'trackio: trackio show --project "{project}"')

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import trackio

        table = trackio.Table(columns=list(COLUMNS), data=[cells({**row, "step": step}) for row in rows])
        self._tracker.log({"samples": table}, step=step)

    def close(self, status: str) -> None:
        import trackio

        with _quiet():
            # Not accelerate's finish: it leaves the run open, and trackio's exit hook ends it a second time.
            trackio.finish()  # type: ignore[no-untyped-call]

    def abandon(self) -> None:
        self.close("failed")


@contextmanager
def _quiet() -> Iterator[None]:
    """trackio prints eight lines at the start, over the progress bar; ours says the same in one."""
    with redirect_stdout(io.StringIO()):
        yield
