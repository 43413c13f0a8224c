"""The best weights so far by a held-out metric, in ``best/`` beside ``final/``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.runtime.manifest import write_json_atomic

RECORD = "best.json"


def lower_is_better(metric: str) -> bool:
    """Losses and KL; of every other metric the highest is the best."""
    return metric.endswith("loss") or metric.startswith("eval/kl")


@dataclass(frozen=True)
class Keeper:
    """Exports the weights whenever ``metric`` beats every earlier evaluation of the run.

    export: writes the model to ``folder``, on all ranks together. What was best is read back from ``best.json``, which
    lies in the folder itself and so is replaced with it: a run that resumes goes on from there, and an evaluation
    repeated after a kill changes nothing.
    """

    metric: str
    folder: Path
    export: Callable[[Mapping[str, float | int | str]], None]

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """To be called on every rank with the same metrics; one without the metric is passed over."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return
        best = self.best()
        if best is None or (value < best if lower_is_better(self.metric) else value > best):
            self.export({"step": step, "metric": self.metric, "value": value})

    def best(self) -> float | None:
        """The value of what is kept; None where nothing is, or where another metric chose it."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return float(record["value"]) if record["metric"] == self.metric else None


def write_record(folder: Path, record: Mapping[str, float | int | str]) -> None:
    """What was kept and why, into a folder that is still being staged."""
    write_json_atomic(folder / RECORD, dict(record))
