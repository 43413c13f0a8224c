"""Where a frozen model's weights lie: whole on every process, sharded over them by ZeRO-3, or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf.interfaces import Collective
from rlhf.runtime.distributed import compile_nothing, quiet_stdout

Placement = Literal["replicate", "zero3", "offload"]
Use = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Placed:
    """model: what is called; equally often on every process where ``sharded``. use: entered around the calls of a
    phase."""

    model: nn.Module
    sharded: bool = False
    use: Use = nullcontext


def place(model: nn.Module, how: Placement, device: torch.device, collective: Collective) -> Placed:
    """Puts a frozen model where its recipe wants it. One process alone has nobody to shard over and keeps it whole."""
    if how == "zero3" and collective.world_size > 1:
        return Placed(_sharded(model), sharded=True)
    if how == "offload" and device.type != "cpu":
        return Placed(model.to("cpu"), use=_moved_in(model, device))
    return Placed(model.to(device))


def _sharded(model: nn.Module) -> nn.Module:
    """A DeepSpeed engine without an optimizer. Weights of a module are gathered while it computes."""
    import deepspeed

    compile_nothing()
    low = next(model.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,  # nothing reads it; DeepSpeed wants one
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": low == torch.bfloat16},
        "fp16": {"enabled": low == torch.float16},
    }
    with quiet_stdout():
        engine: Any = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return cast(nn.Module, engine)


def _moved_in(model: nn.Module, device: torch.device) -> Use:
    @contextmanager
    def use() -> Iterator[None]:
        model.to(device)
        try:
            yield
        finally:
            model.to("cpu")

    return use
