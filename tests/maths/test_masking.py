from __future__ import annotations

import pytest
import torch

from rlhf.maths import masking

NAN, INF = float("nan"), float("inf")


def test_masked_reductions_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masking.masked_sum(x, mask) == 7
    assert masking.masked_sum(x, mask, dim=1).tolist() == [3, 4]
    assert masking.masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masking.masked_mean(x, mask, dim=1).tolist() == [1.5, 4]
    assert masking.masked_var(x, mask, dim=1).tolist() == [0.5, 0]  # one entry has no unbiased variance: 0
    assert masking.masked_var(x, mask, dim=1, unbiased=False).tolist() == [0.25, 0]
    # 1, 2, 4: mean 7/3, squares 16/9 + 1/9 + 25/9 = 14/3
    assert masking.masked_var(x, mask).item() == pytest.approx(7 / 3)


def test_a_row_mask_counts_every_entry_of_the_row() -> None:
    x = torch.tensor([[1.0, 3.0], [10.0, 20.0]])
    assert masking.masked_mean(x, torch.tensor([[True], [False]])).item() == 2


def test_nothing_to_reduce_is_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masking.masked_mean(torch.full((2, 3), NAN), nothing).item() == 0
    assert masking.masked_var(torch.full((2, 3), NAN), nothing).item() == 0


def test_excluded_entries_have_no_gradient() -> None:
    x = torch.tensor([1.0, NAN, INF], requires_grad=True)
    (gradient,) = torch.autograd.grad(masking.masked_mean(x, torch.tensor([True, False, False])), x)
    assert gradient.tolist() == [1, 0, 0]


GROUP = torch.tensor([70, -3, 70, 70, -3, 8])
VALID = torch.tensor([True, True, True, False, True, True])


def test_group_sum_in_any_order_of_rows() -> None:
    x = torch.tensor([1.0, 10.0, 2.0, NAN, 20.0, 5.0])
    inverse, groups = masking.group_index(GROUP)
    assert groups == 3 and inverse.tolist() == [2, 0, 2, 2, 0, 1]
    assert masking.group_sum(x, GROUP, VALID).tolist() == [30, 5, 3]
    assert masking.group_sum(torch.stack([x, 2 * x], 1), GROUP, VALID).tolist() == [[30, 60], [5, 10], [3, 6]]


def test_leave_one_out_mean_by_hand() -> None:
    x = torch.tensor([1.0, 10.0, 2.0, NAN, 20.0, 5.0])
    mean, has_others = masking.leave_one_out_mean(x, GROUP, VALID)
    assert mean.tolist() == [2, 20, 1, 1.5, 10, 0]  # an invalid row has two valid neighbours, the last row has none
    assert has_others.tolist() == [True, True, True, True, True, False]
    assert mean.dtype == torch.float32
    per_token, _ = masking.leave_one_out_mean(torch.stack([x, -x], 1), GROUP, VALID)
    assert per_token[:, 1].tolist() == [-2, -20, -1, -1.5, -10, 0]


def test_an_outlier_does_not_wash_out_the_others() -> None:
    """1e8 + 1 = 1e8 in float32: subtracting the row from a float32 total would leave 0 and not 1."""
    mean, _ = masking.leave_one_out_mean(torch.tensor([1e8, 1.0]), torch.tensor([0, 0]), torch.tensor([True, True]))
    assert mean.tolist() == [1, 1e8]


def test_row_order_changes_nothing() -> None:
    x, order = torch.randn(6, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0, 5, 1, 4, 2])
    straight, _ = masking.leave_one_out_mean(x, GROUP, VALID)
    shuffled, _ = masking.leave_one_out_mean(x[order], GROUP[order], VALID[order])
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=0)


def test_completion_ends_with_its_first_stop_token() -> None:
    ids = torch.tensor([[5, 1, 7, 1], [5, 6, 7, 8], [2, 2, 2, 2], [5, 6, 7, 1]])
    assert masking.first_stop(ids, [1, 2]).tolist() == [1, 4, 0, 3]
    mask, finished = masking.completion_mask(ids, [1, 2])
    assert mask.sum(1).tolist() == [2, 4, 1, 4]  # the stop token counts
    assert mask[0].tolist() == [True, True, False, False]
    assert finished.tolist() == [True, False, True, True]


def test_no_stop_ids_and_no_tokens() -> None:
    mask, finished = masking.completion_mask(torch.tensor([[1, 2]]), [])
    assert mask.all() and not finished.any()
    mask, finished = masking.completion_mask(torch.zeros((2, 0), dtype=torch.long), [1])
    assert mask.shape == (2, 0) and not finished.any()
