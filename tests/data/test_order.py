from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rlhf.data.order import epoch_permutation, positions, weighted_rows


def test_an_epoch_holds_every_row_once() -> None:
    assert sorted(epoch_permutation(10, 3, 0).tolist()) == list(range(10))


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    order = epoch_permutation(50, 1, 2).tolist()
    epoch_permutation.cache_clear()
    np.random.seed(0)
    assert epoch_permutation(50, 1, 2).tolist() == order
    assert epoch_permutation(50, 2, 1).tolist() != order  # seed and epoch do not stand for each other
    assert epoch_permutation(50, 1, 3).tolist() != order


def test_a_permutation_is_the_same_on_every_machine() -> None:
    assert epoch_permutation(8, 0, 0).tolist() == [
        3,
        6,
        4,
        0,
        7,
        5,
        2,
        1,
    ]  # a change would silently reorder every resumed run


def test_steps_tile_the_epochs() -> None:
    n, per_step = 10, 4  # steps 1-5 read exactly two epochs; step 3 crosses the seam
    read = [row for step in range(1, 6) for row in positions(step, per_step, n, seed=7)]
    assert read == epoch_permutation(n, 7, 0).tolist() + epoch_permutation(n, 7, 1).tolist()


def test_a_step_larger_than_the_data_reads_several_epochs() -> None:
    assert Counter(positions(1, 9, 3, seed=0)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(("step", "n"), [(0, 5), (-1, 5), (1, 0)])
def test_positions_refuse_what_has_no_meaning(step: int, n: int) -> None:
    with pytest.raises(ValueError, match="positions are for"):
        positions(step, 2, n, 0)


def test_weights_multiply_how_often_rows_come() -> None:
    rows = weighted_rows([4, 2], [1.5, 2.0], seed=0)
    counts = Counter(rows)
    assert [counts[1, row] for row in range(2)] == [2, 2]
    assert sorted(counts[0, row] for row in range(4)) == [1, 1, 2, 2]
    assert weighted_rows([4, 2], [1.0, 1.0], seed=5) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_the_part_of_a_fractional_weight_changes_with_the_epoch() -> None:
    halves = {tuple(weighted_rows([6], [0.5], seed=0, epoch=epoch)) for epoch in range(6)}
    assert len(halves) > 1
    assert all(len(half) == 3 for half in halves)
