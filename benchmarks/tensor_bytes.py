"""Memory as the allocator sees it. Resident size depends on the allocator's habits; bytes asked for do not."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Peak:
    """bytes: the most that was held at once beyond what was held at the beginning. CPU tensors, every allocation.
    within: the same inside each ``torch.profiler.record_function`` whose name starts with ``part:``."""

    bytes: int = 0
    within: dict[str, int] = field(default_factory=dict)


@contextmanager
def peak() -> Iterator[Peak]:
    """Slows what it watches: not for timing."""
    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as watched:
        yield found
    results: Any = watched.profiler
    events = list(results.kineto_results.events())
    parts = [
        (event.name().removeprefix("part:"), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().startswith("part:")
    ]
    held = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        found.bytes = max(found.bytes, held)
        for name, start, end in parts:
            if start <= event.start_ns() <= end:
                found.within[name] = max(found.within.get(name, 0), held)


def held() -> int:
    """Bytes of every CPU tensor that is alive, shared storage counted once. What only C++ holds is not seen."""
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance on lazy modules of libraries warns
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
