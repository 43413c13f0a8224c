"""Metrics that have left the range in which a run can be trusted: one line each, once a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Line(NamedTuple):
    """crossed: whether a value of the metric is worth a word. advice: what it means and what to set."""

    crossed: Callable[[float], bool]
    advice: str


LINES: Mapping[str, Line] = {
    "policy/effective_sample_share": Line(
        lambda share: share < 0.5,
        "fewer than half of the completions still count in the last update of a rollout: it is spent. Lower optim.lr, "
        "reinforce.updates_per_rollout or ppo.epochs, or set ppo.stop_kl",
    ),
}


@dataclass
class Alarms:
    """Remembers what it has said."""

    said: set[str] = field(default_factory=set)

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """A line for each metric that has crossed its line for the first time."""
        crossed = [n for n, line in LINES.items() if n in metrics and n not in self.said and line.crossed(metrics[n])]
        self.said.update(crossed)
        return [f"warning: step {step}: {name} is {metrics[name]:.2f}: {LINES[name].advice}" for name in crossed]
