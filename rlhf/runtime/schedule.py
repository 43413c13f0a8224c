"""The learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_schedule(
    lr: float, schedule: str, *, total_steps: int, warmup_ratio: float
) -> Callable[[int], float]:
    """lr of each optimizer step, counted from 1: linear warm-up, then ``constant``, or ``linear`` or ``cosine`` to 0.

    No scheduler object: nothing to save, and nothing that a launcher steps once per process.
    """
    warmup = math.ceil(total_steps * warmup_ratio)

    def at(step: int) -> float:
        if step <= warmup:
            return lr * step / warmup
        progress = (step - warmup - 1) / max(1, total_steps - warmup)
        if schedule == "linear":
            return lr * (1.0 - progress)
        if schedule == "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        return lr

    return at
