"""TensorBoard event files in the run directory, through accelerate's tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.tracking.mirror import COLUMNS, cells, relative
from rlhf.tracking.redact import printable, redact

FOLDER = "tensorboard"


class TensorBoard:
    """Scalars, the resolved recipe as a text, and every step's samples as a text table.

    last_step: the step a resumed run goes on from. Events past it, of the life that was interrupted, are hidden.
    """

    def __init__(
        self, run: Path, *, config: Mapping[str, Any], note: Callable[[str], None], last_step: int | None
    ) -> None:
        from accelerate.tracking import TensorBoardTracker

        purge = None if last_step is None else last_step + 1
        self._tracker = TensorBoardTracker(run_name=FOLDER, logging_dir=str(run), purge_step=purge)
        self._tracker.start()
        # Not accelerate's store_init_configuration: it takes flat values only and shows each start as one more run.
        self._tracker.log({"recipe": _code(yaml.safe_dump(redact(dict(config)), sort_keys=False))}, step=0)
        note(f"tensorboard: tensorboard --logdir {relative(run / FOLDER)}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells({**row, "step": step}) for row in rows)]
        self._tracker.log({"samples": "\n".join(_table_row(row) for row in table)}, step=step)

    def close(self, status: str) -> None:
        self._tracker.finish()

    def abandon(self) -> None:
        self._tracker.finish()


def _code(text: str) -> str:
    """Markdown shows a block of code as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table_row(values: Sequence[Any]) -> str:
    shown = ("" if value is None else printable(str(value), newlines=False).replace("|", "\\|") for value in values)
    return f"| {' | '.join(shown)} |"
