"""How units are packed into forwards: within the budget, and without padding that costs more than it saves."""

from __future__ import annotations

import random
from functools import reduce

import pytest

from rlhf.models.layout import Layout, SharedPrompts, Size, plain_rows
from rlhf.rollout import TokenBatch
from rlhf.runtime.microbatches import pack, split


def sizes(lengths: list[int]) -> list[Size]:
    return [Size.of([0], [length]) for length in lengths]


def rollout(seed: int, groups: int, k: int, longest: int) -> TokenBatch:
    """Random lengths; the k rows of a group have one prompt."""
    drawn = random.Random(seed)
    prompts = [[2] * drawn.randint(1, longest) for _ in range(groups)]
    rows = [(prompts[group], [5] * drawn.randint(1, longest)) for group in range(groups) for _ in range(k)]
    group = [group for group in range(groups) for _ in range(k)]
    return TokenBatch.from_ids([p for p, _ in rows], [c for _, c in rows], group=group)


def test_forwards_stay_within_the_budget_and_take_everything_once() -> None:
    cuts = pack(sizes([3, 10, 4, 10, 2, 30]), 20, plain_rows.cells)
    assert cuts[0] == [5]  # beyond the budget: alone
    assert cuts[1] == [1, 3]
    assert sorted(at for cut in cuts for at in cut) == list(range(6))


def test_short_rows_are_not_padded_to_long_ones() -> None:
    lengths = [100] * 8 + [50] * 8
    assert pack(sizes(lengths), 1600, plain_rows.cells) == [list(range(8)), list(range(8, 16))]


def test_a_forward_is_not_closed_before_it_holds_a_sixteenth_of_the_budget() -> None:
    assert pack(sizes([10, 5, 2]), 1600, plain_rows.cells) == [[0, 1, 2]]


def test_similar_lengths_share_a_forward() -> None:
    assert len(pack(sizes([100, 95, 92, 90]), 1600, plain_rows.cells)) == 1


@pytest.mark.parametrize("layout", [plain_rows, SharedPrompts(), SharedPrompts(row_tokens=20)])
@pytest.mark.parametrize("seed", range(6))
def test_what_a_forward_is_said_to_cost_is_what_is_laid_out(layout: Layout, seed: int) -> None:
    """Also where a layout that can share a prompt finds that it does not pay."""
    batch = rollout(seed, groups=3, k=1 + seed % 3, longest=(2, 9, 30)[seed % 3])
    for part in split(batch, 40 * (1 + seed), None, layout.cells):
        prompts, completions = part.batch.prompt_mask.sum(1).tolist(), part.batch.completion_mask.sum(1).tolist()
        members = [(part.batch.group == group).nonzero()[:, 0].tolist() for group in part.batch.group.unique()]
        units = [Size.of([prompts[row] for row in rows], [completions[row] for row in rows]) for rows in members]
        assert layout.cells(reduce(Size.joined, units)) == layout(part.batch).input_ids.numel()


def test_more_groups_fit_where_they_share_their_prompts() -> None:
    batch = TokenBatch.from_ids([[2] * 90] * 16, [[5] * 10] * 16, group=[row // 4 for row in range(16)])
    assert len(split(batch, 520, None, plain_rows.cells)) == 4
    assert len(split(batch, 520, None, SharedPrompts().cells)) == 1


def test_microbatches_are_a_sequence_that_holds_one_at_a_time() -> None:
    batch = rollout(0, groups=5, k=2, longest=9)
    cuts = split(batch, 40)
    assert cuts[-1].rows.tolist() == list(cuts)[-1].rows.tolist() == cuts[len(cuts) - 1 :][0].rows.tolist()
    assert cuts[0].batch is not cuts[0].batch  # made anew
    with pytest.raises(IndexError):
        cuts[len(cuts)]
