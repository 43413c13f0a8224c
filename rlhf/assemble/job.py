"""What every objective comes down to: something that trains, and a model to save at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf.interfaces import TrainState


def _nothing(model: nn.Module) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Job:
    """train: runs the steps that are left. finish: last touches on the trained model before it is exported."""

    train: Callable[[TrainState], TrainState]
    model: nn.Module
    optimizer: Any
    tokenizer: Any
    steps: int
    finish: Callable[[nn.Module], None] = _nothing
