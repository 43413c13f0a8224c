"""The order of data as pure functions of (seed, position): a run that resumes needs no saved state, and skips nothing.

Training reads an endless sequence: epoch 0 shuffled, epoch 1 shuffled differently, and so on, with no gap between them.
Step s (from 1) takes the ``per_step`` positions that follow those of step s - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Permutation = NDArray[np.int64]


@lru_cache(maxsize=4)
def epoch_permutation(n: int, seed: int, epoch: int) -> Permutation:
    """[n] int64, read-only: the order of an epoch. Philox keyed by (seed, epoch), so epochs are independent."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(n).astype(np.int64)
    order.flags.writeable = False  # it is shared by everybody who asks for this epoch
    return order


def positions(step: int, per_step: int, n: int, seed: int) -> list[int]:
    """The ``per_step`` rows of step ``step`` (from 1) out of ``n``; every row comes once per epoch.

    A step may reach into the next epoch, and holds a row twice when ``per_step`` exceeds what is left.
    Raises ValueError for step < 1 and n < 1.
    """
    if step < 1 or n < 1:
        raise ValueError(f"positions are for step >= 1 and n >= 1 rows, not step {step} and n {n}")
    first = (step - 1) * per_step
    return [int(epoch_permutation(n, seed, where // n)[where % n]) for where in range(first, first + per_step)]


def subset(n: int, count: int, seed: int, epoch: int, item: int) -> list[int]:
    """``count`` of n things, sorted: another draw for every (seed, epoch, item)."""
    key = np.random.SeedSequence([seed, epoch, item]).generate_state(2, np.uint64)
    chosen = np.random.Generator(np.random.Philox(key=key)).permutation(n)[:count]
    return sorted(int(index) for index in chosen)


def weighted_rows(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int = 0) -> list[tuple[int, int]]:
    """(source, row) of every row of a mixture, source after source.

    A weight multiplies how often a source's rows come in an epoch: 2 = every row twice, 0.5 = half of the rows, 2.5 =
    every row twice and half of them once more. The half is drawn by (seed, epoch, source).
    """
    rows: list[tuple[int, int]] = []
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        whole = int(weight)
        extra = round((weight - whole) * size)
        chosen = sorted(epoch_permutation(size, seed, epoch * len(sizes) + source)[:extra].tolist())
        rows += [(source, row) for _ in range(whole) for row in range(size)] + [(source, row) for row in chosen]
    return rows
