"""Memory as the allocator sees it. Resident size depends on the allocator's habits; bytes asked for do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile


class Peak:
    """bytes: the most that was held at once beyond what was held at the beginning. CPU tensors, every allocation."""

    bytes = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """Slows what it watches: not for timing."""
    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as watched:
        yield found
    results: Any = watched.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        found.bytes = max(found.bytes, held)
