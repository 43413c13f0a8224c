"""Servers asked for a prompt's completions as soon as the last of them has ended, while others are still decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rlhf.interfaces import Asked, Remote
from rlhf.rollout import Group, Rollout

Sources = Mapping[str, Remote]


@dataclass
class Early:
    """What was asked about rollouts that are not whole yet: step → (source, slot) → scores on their way.

    Each prompt has requests of its own, whoever ends first, so scores do not depend on when it did.
    """

    asked: dict[int, dict[tuple[str, int], Asked]] = field(default_factory=dict)
    last: tuple[list[Asked], float] = ([], 0.0)  # of the last rollout: what was asked early, and when it was whole

    def ask(self, sources: Sources, group: Group, step: int) -> None:
        for name, source in sources.items():
            self.asked.setdefault(step, {})[name, group.slot] = source.ask(group, step)

    def begin(self, sources: Sources, rollout: Rollout, step: int) -> dict[str, Callable[[], Tensor]]:
        """Of each source the scores to come of the whole rollout. What was asked early is not asked again."""
        known = self.asked.pop(step, {})
        self.last = list(known.values()), time.monotonic()
        if not known:
            return {name: source.begin(rollout, step) for name, source in sources.items()}
        groups = list(rollout.groups())
        return {
            name: source.begin(rollout, step, [known.get((name, g.slot)) or source.ask(g, step) for g in groups])
            for name, source in sources.items()
        }

    def metrics(self) -> dict[str, float]:
        """``time/score_hidden_seconds`` of the last rollout, once its scores are there; nothing if none was early."""
        asked, whole = self.last
        spans = [span for answer in asked for span in answer.spans]
        return {"time/score_hidden_seconds": covered(spans, whole)} if asked else {}


def covered(spans: Iterable[tuple[float, float]], until: float) -> float:
    """How much of the time up to ``until`` lies in at least one of the spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        new = min(end, until) - max(start, reached)
        total += max(new, 0.0)
        reached = max(reached, end)
    return total
