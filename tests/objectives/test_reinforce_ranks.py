"""``Reinforce.prepare`` on several ranks: baselines are of the global batch, however it is spread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import Alone, TrainState
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Rollout
from tests.objectives.by_hand import BETA, advantages, make, without


@dataclass(frozen=True)
class Rank:
    """A Collective of threads: everyone puts its part on the board, and all go on when all have."""

    rank: int
    world_size: int
    board: dict[int, Tensor]
    meeting: Barrier

    def gather(self, value: Tensor) -> Tensor:
        self.board[self.rank] = value
        self.meeting.wait()
        whole = torch.cat([self.board[rank] for rank in range(self.world_size)])
        self.meeting.wait()
        return whole

    def sum(self, value: Tensor) -> Tensor:
        return self.gather(value[None]).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return self.gather(value[None]).amax(0)


def on_ranks(objective: Reinforce, parts: Sequence[Rollout], state: TrainState) -> list[tuple[Rollout, TrainState]]:
    """``prepare`` on one thread per part. A rank that gathers more often than another breaks the barrier."""
    board: dict[int, Tensor] = {}
    meeting = Barrier(len(parts), timeout=10)
    ranks = [Rank(index, len(parts), board, meeting) for index in range(len(parts))]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda rank: objective.prepare(parts[rank.rank], state, rank), ranks))


def eight_rows() -> Rollout:
    """Four prompts, two completions each; row 5 could not be scored."""
    rows = torch.arange(24.0).reshape(8, 3)
    known = make(
        [3.0, 1, 4, 1, 5, 9, 2, 6],
        [row // 2 for row in range(8)],
        [3, 1, 2, 2, 1, 3, 2, 1],
        ref_logprobs=-3 - rows.cos(),
        rollout_logprobs=-3 - rows.sin(),
        score_norms=1 + rows.sin() / 2,
        greedy_rewards=torch.tensor([2.0, 2, 3, 3, 4, 4, 5, 5]),
    )
    return without(known, 5)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize(
    "baseline", ["none", "moving_average", "batch_mean", "leave_one_out", "shrinkage", "greedy", "optimal_token"]
)
def test_two_ranks_have_the_advantages_of_one(baseline: Any, beta: float) -> None:
    objective, state = Reinforce(beta=beta, baseline=baseline), TrainState(moving_average=2.0)
    whole, after = objective.prepare(eight_rows(), state, Alone())
    halves = on_ranks(objective, [eight_rows().select(range(4)), eight_rows().select(range(4, 8))], state)
    assert whole.advantages is not None and whole.baseline is not None
    for name in ("advantages", "baseline"):
        parts = [getattr(part, name) for part, _ in halves]
        torch.testing.assert_close(torch.cat(parts), getattr(whole, name), atol=0, rtol=0)  # the same numbers in order
    assert [found for _, found in halves] == [after, after]


def test_ranks_that_see_only_their_own_rows_would_differ() -> None:
    """The test above means something: a mean over a half is another number."""
    objective = Reinforce(beta=0.0, baseline="batch_mean")
    apart = [advantages(objective, eight_rows().select(rows)) for rows in (range(4), range(4, 8))]
    assert apart[0] + apart[1] != advantages(objective, eight_rows())


def test_greedy_rewards_that_are_missing_are_filled_from_all_ranks() -> None:
    """The mean of the scorable ones, (2·2 + 3·2 + 4·2)/6 = 3, on whichever rank they are; rank 1 alone would say 4."""
    rollout = replace(eight_rows(), greedy_rewards=torch.tensor([2.0, 2, 3, 3, 4, 4, torch.nan, torch.nan]))
    objective = Reinforce(beta=0.0, baseline="greedy")
    whole = objective.prepare(rollout, TrainState(), Alone())[0]
    halves = on_ranks(objective, [rollout.select(range(4)), rollout.select(range(4, 8))], TrainState())
    assert whole.baseline is not None and whole.baseline.tolist() == [2, 2, 3, 3, 4, 4, 3, 3]
    parts = [part.baseline for part, _ in halves if part.baseline is not None]
    assert torch.cat(parts).tolist() == whole.baseline.tolist()
