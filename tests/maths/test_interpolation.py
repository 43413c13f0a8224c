"""Means of weights by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.maths.interpolation import linear, slerp


def test_the_mean_is_weighted() -> None:
    found = linear([torch.tensor([1.0, 3.0]), torch.tensor([5.0, -1.0])], [3.0, 1.0])
    assert found.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="add up to 0"):
        linear([torch.ones(1), torch.ones(1)], [1.0, -1.0])


def test_half_way_along_the_arc() -> None:
    """Differences (2, 0) and (0, 2) from (1, 1): linear gives (1, 1), of length √2; the arc (√2, √2), of length 2."""
    base = torch.tensor([1.0, 1.0])
    first, second = base + torch.tensor([2.0, 0.0]), base + torch.tensor([0.0, 2.0])
    assert slerp(base, first, second, 0.5).tolist() == pytest.approx([1 + 2**0.5, 1 + 2**0.5])
    assert slerp(base, first, second, 0.0).tolist() == pytest.approx(first.tolist())
    assert slerp(base, first, second, 1.0).tolist() == pytest.approx(second.tolist())
    # a third of the way is 30 degrees
    assert slerp(base, first, second, 1 / 3).tolist() == pytest.approx([1 + 3**0.5, 2.0])


@pytest.mark.parametrize("second", [[3.0, 1.0], [1.0, 1.0]])
def test_where_there_is_no_arc_it_is_a_line(second: list[float]) -> None:
    """Parallel differences (1, 0) and (2, 0), and one that is 0."""
    base, first = torch.ones(2), torch.tensor([2.0, 1.0])
    found = slerp(base, first, torch.tensor(second), 0.5)
    assert found.tolist() == pytest.approx([(2.0 + second[0]) / 2, 1.0])
