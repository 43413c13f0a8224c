from __future__ import annotations

import pytest
import torch

from rlhf.maths import baselines

NAN = float("nan")
# Groups 5, 2, 9 in mixed order; row 3 could not be scored; row 5 is alone.
REWARDS = torch.tensor([1.0, 10.0, 4.0, NAN, 30.0, 8.0])
GROUP = torch.tensor([5, 2, 5, 5, 2, 9])
VALID = torch.tensor([True, True, True, False, True, True])


def test_simple_baselines_by_hand() -> None:
    assert baselines.none(REWARDS).tolist() == [0] * 6
    assert baselines.moving_average(REWARDS, None).tolist() == [0] * 6
    assert baselines.moving_average(REWARDS, 2.5).tolist() == [2.5] * 6
    assert baselines.batch_mean(REWARDS, VALID).tolist() == pytest.approx([53 / 5] * 3 + [0] + [53 / 5] * 2)
    assert baselines.leave_one_out(REWARDS, GROUP, VALID).tolist() == [4, 30, 1, 0, 10, 8]  # alone: its own reward


def test_advantages_are_exactly_zero_where_nothing_counts() -> None:
    found = baselines.advantages(REWARDS, baselines.leave_one_out(REWARDS, GROUP, VALID), VALID)
    assert found.tolist() == [-3, -20, 3, 0, 20, 0]
    per_token = baselines.advantages(REWARDS, torch.ones(6, 2), VALID)
    assert per_token.tolist() == [[0, 0], [9, 9], [3, 3], [0, 0], [29, 29], [7, 7]]


def test_moving_average_is_updated_after_use() -> None:
    first = baselines.update_moving_average(None, REWARDS, VALID)
    assert first == pytest.approx(53 / 5)
    assert baselines.update_moving_average(1.0, REWARDS, VALID) == pytest.approx(0.9 + 0.1 * 53 / 5)
    assert baselines.update_moving_average(1.0, REWARDS, VALID, decay=0.5) == pytest.approx(0.5 + 0.5 * 53 / 5)
    assert baselines.update_moving_average(1.0, REWARDS, torch.zeros_like(VALID)) == 1.0
    assert baselines.update_moving_average(None, REWARDS, torch.zeros_like(VALID)) is None


def test_leave_one_out_ignores_a_constant_and_equal_rewards_give_no_update() -> None:
    shifted = baselines.advantages(REWARDS + 100, baselines.leave_one_out(REWARDS + 100, GROUP, VALID), VALID)
    assert shifted.tolist() == [-3, -20, 3, 0, 20, 0]
    equal = torch.full((6,), 0.1)
    for found in (baselines.leave_one_out(equal, GROUP, VALID), baselines.shrinkage(equal, GROUP, VALID)):
        assert baselines.advantages(equal, found, VALID).tolist() == [0] * 6


def test_shrinkage_with_three_groups_is_leave_one_out() -> None:
    found = baselines.shrinkage(REWARDS, GROUP, VALID)
    assert found.tolist() == baselines.leave_one_out(REWARDS, GROUP, VALID).tolist()


def test_shrinkage_by_hand() -> None:
    """Four groups of two: means 0, 10, 20, 1; spreads (Σ squares) 2, 8, 18, 2.

    For group 0 (others 10, 20, 1): σ² = 28/3, mean 31/3, variance of means = (501 − 961/3)/2 = 271/3, of which
    σ²·½ = 14/3 is noise: τ² = 257/3. Error of the others' mean: 4/3·257/3 + (14/3)/3 = 1042/9; λ = (84/9)/(1126/9).
    """
    rewards = torch.tensor([-1.0, 1.0, 8.0, 12.0, 17.0, 23.0, 0.0, 2.0], dtype=torch.float64)
    group = torch.arange(8) // 2
    found = baselines.shrinkage(rewards, group, torch.ones(8, dtype=torch.bool))
    weight = 84 / 1126
    others = weight * 31 / 3
    assert found[:2].tolist() == pytest.approx([(1 - weight) * 1 + others, (1 - weight) * -1 + others], rel=1e-12)


def test_shrinkage_at_its_two_ends() -> None:
    group, valid = torch.arange(10) // 2, torch.ones(10, dtype=torch.bool)
    # No spread within groups: leave-one-out knows the mean exactly.
    certain = torch.tensor([1.0, 1, 5, 5, 2, 2, 9, 9, 4, 4], dtype=torch.float64)
    assert baselines.shrinkage(certain, group, valid).tolist() == certain.tolist()
    # Equal means: λ = 1/(1 + 1/(k·(P − 1))) = 8/9; the other groups' mean is 0.
    alike = torch.tensor([-1.0, 1] * 5, dtype=torch.float64)
    assert baselines.shrinkage(alike, group, valid).tolist() == pytest.approx([1 / 9, -1 / 9] * 5, rel=1e-12)


def test_shrinkage_gives_a_lone_completion_the_other_prompts() -> None:
    rewards = torch.tensor([7.0, 1, 3, 4, 6, -1, 1], dtype=torch.float64)
    group, valid = torch.tensor([0, 1, 1, 2, 2, 3, 3]), torch.ones(7, dtype=torch.bool)
    assert baselines.shrinkage(rewards, group, valid)[0].item() == pytest.approx((2 + 5 + 0) / 3, rel=1e-12)


def test_shrinkage_with_one_completion_a_prompt_is_the_mean_of_the_others() -> None:
    found = baselines.shrinkage(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.arange(4), torch.ones(4, dtype=torch.bool))
    assert found.tolist() == pytest.approx([11 / 3, 10 / 3, 3, 2])


def test_shrinkage_keeps_its_digits_under_a_large_common_reward() -> None:
    """At 1e8 the squares of the means hold no digit of a variance of 1 unless they are centred first."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group, valid = torch.arange(12) // 2, torch.ones(12, dtype=torch.bool)
    shifted = baselines.shrinkage(rewards + 1e8, group, valid) - 1e8
    torch.testing.assert_close(shifted, baselines.shrinkage(rewards, group, valid), rtol=0, atol=1e-6)


def test_shrinkage_leaves_unscored_rows_out() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, group = torch.randn(12, generator=generator), torch.arange(12) // 2
    valid = torch.ones(12, dtype=torch.bool)
    valid[[0, 6, 7]] = False  # group 3 vanishes, group 0 keeps one row
    with_nan = torch.where(valid, rewards, torch.nan)
    found = baselines.shrinkage(with_nan, group, valid)
    torch.testing.assert_close(found[valid], baselines.shrinkage(rewards[valid], group[valid], valid[valid]))
    assert found[~valid].tolist() == [0, 0, 0]


def test_shrinkage_does_not_look_at_its_own_group() -> None:
    """Moving a row's own group by 1e6 moves its leave-one-out part and nothing else: λ and the rest stay."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(16, generator=generator, dtype=torch.float64)
    group, valid = torch.arange(16) // 2, torch.ones(16, dtype=torch.bool)
    before = baselines.shrinkage(rewards, group, valid)[0]
    weights = []
    for reward in (2.0, 1e6):  # of row 1, the other row of group 0
        moved = rewards.clone()
        moved[1] = reward
        weights.append(float((baselines.shrinkage(moved, group, valid)[0] - before) / (reward - rewards[1])))
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


def test_greedy_by_hand() -> None:
    assert baselines.greedy(torch.tensor([1.0, 1.0, 5.0])).tolist() == [1, 1, 5]
    assert baselines.greedy(torch.tensor([1.0, NAN, 5.0])).tolist() == [1, 3, 5]
    assert baselines.greedy(torch.tensor([NAN, NAN])).tolist() == [0, 0]


def test_value_is_detached_and_masked() -> None:
    values = torch.tensor([[1.0, NAN], [2.0, 3.0]], requires_grad=True)
    found = baselines.value(values, torch.tensor([[True, False], [True, True]]), torch.tensor([True, False]))
    assert found.tolist() == [[1, 0], [0, 0]] and not found.requires_grad


def test_optimal_token_by_hand() -> None:
    """W of the other rows: [1, 3] and [2, 2] (ended, keeps its last value) weigh rewards 10 and 40."""
    rewards = torch.tensor([0.0, 10.0, 40.0, NAN, 6.0])
    norms = torch.tensor([[5.0, 5.0], [1.0, 2.0], [2.0, NAN], [NAN, NAN], [1.0, 1.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    group, valid = torch.tensor([1, 1, 1, 1, 7]), torch.tensor([True, True, True, False, True])
    found = baselines.optimal_token(rewards, norms, mask, group, valid)
    # Weights carry a floor of 1e-8: digits beyond the seventh differ.
    assert found[0].tolist() == pytest.approx([(10 + 80) / 3, (30 + 80) / 5], rel=1e-6)
    assert found[1].tolist() == pytest.approx([80 / 7, 80 / 12], rel=1e-6)
    assert found[2].tolist() == pytest.approx([10 / 6, 0], rel=1e-6)  # its second token does not count
    assert found[3].tolist() == [0, 0] and found[4].tolist() == [6, 6]


def test_optimal_token_with_certain_tokens_is_the_plain_mean() -> None:
    rewards, ones = torch.tensor([1.0, 2.0, 6.0]), torch.ones(3, 2, dtype=torch.bool)
    found = baselines.optimal_token(rewards, torch.zeros(3, 2), ones, torch.zeros(3), ones[:, 0])
    assert found[:, 0].tolist() == pytest.approx([4, 3.5, 1.5])


def test_group_standardised_and_whitened_by_hand() -> None:
    found = baselines.group_standardised(REWARDS, GROUP, VALID)
    assert found.tolist() == pytest.approx([-1, -1, 1, 0, 1, 0], abs=1e-6)
    white = baselines.whitened(torch.tensor([1.0, 2.0, NAN, 6.0]), torch.tensor([True, True, False, True]))
    assert white.tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 0, 3 / 7**0.5])
    tokens = baselines.whitened(torch.tensor([[1.0, 3.0], [NAN, NAN]]), torch.tensor([[True, True], [False, False]]))
    assert tokens.tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5]), [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    rewards, group = torch.arange(8, dtype=dtype), torch.arange(8) // 2
    valid = torch.ones(8, dtype=torch.bool)
    tokens = torch.ones(8, 3, dtype=dtype)
    found = [
        baselines.batch_mean(rewards, valid),
        baselines.leave_one_out(rewards, group, valid),
        baselines.shrinkage(rewards, group, valid),
        baselines.greedy(rewards),
        baselines.optimal_token(rewards, tokens, tokens > 0, group, valid),
        baselines.group_standardised(rewards, group, valid),
        baselines.whitened(rewards, valid),
    ]
    assert {value.dtype for value in found} == {dtype}
