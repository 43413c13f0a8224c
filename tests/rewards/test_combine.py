"""From scores to rewards: weights, ensembles, clipping, missing stop tokens, and rows that nobody can score."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.rewards.combine import RewardSet, combine_models
from rlhf.rewards.functions import FunctionReward
from rlhf.rollout import Group, Prompt, Rollout

NAN = math.nan


@dataclass(frozen=True)
class Fixed:
    """A source that always gives the same scores."""

    name: str
    values: tuple[float, ...]

    def score(self, rollout: Rollout, step: int) -> Tensor:
        return torch.tensor(self.values)


def function(name: str, values: list[float | None], weight: float = 1.0) -> FunctionReward:
    return FunctionReward(name, lambda **_: values, weight=weight)


def rollout(rows: int = 3, finished: list[bool] | None = None) -> Rollout:
    return Rollout.from_ids(
        [[2]] * rows,
        [[5, 1]] * rows,
        prompts=tuple(Prompt(row_id=row, text="x") for row in range(rows)),
        texts=("y",) * rows,
        sample=torch.zeros(rows, dtype=torch.long),
        finished=torch.tensor(finished or [True] * rows),
    )


def rewards_of(scored: Rollout) -> list[float]:
    assert scored.rewards is not None
    return scored.rewards.tolist()


def test_models_are_averaged_by_weight_and_functions_added() -> None:
    rewards = RewardSet(
        models=[(Fixed("a", (1.0, 2.0, 3.0)), 3.0), (Fixed("b", (5.0, 2.0, -1.0)), 1.0)],
        functions=[function("length", [1.0, 0.0, 2.0], weight=-0.5)],
    )
    scored = rewards.score(rollout(), step=1)
    # (3·1 + 5)/4 - .5, (3·2 + 2)/4, (3·3 - 1)/4 - 1
    assert rewards_of(scored) == [1.5, 2.0, 1.0]
    assert {name: score.tolist() for name, score in scored.scores.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [5.0, 2.0, -1.0],
        "length": [1.0, 0.0, 2.0],
    }
    assert scored.valid.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [
        ("mean", [1.0, 1.0], [3.0, 2.0]),
        ("min", [1.0, 1.0], [1.0, 2.0]),
        ("uwo", [1.0, 1.0], [1.0, 2.0]),  # 3 - ½·4: both are 2 away from their mean
        ("uwo", [3.0, 1.0], [2.0 - 0.5 * 3.0, 2.0]),  # variance (3·1 + 1·9)/4 = 3
    ],
)
def test_ensembles(how: Any, weights: list[float], expected: list[float]) -> None:
    assert combine_models(torch.tensor([[1.0, 2.0], [5.0, 2.0]]), weights, how).tolist() == expected


def test_what_scores_elsewhere_is_asked_first_and_waited_for_last() -> None:
    """Its answer goes into the rollout as it is when it is waited for."""
    log: list[str] = []

    @dataclass(frozen=True)
    class Elsewhere(Fixed):
        def ask(self, group: Group, step: int) -> Any:
            raise AssertionError("nothing ended early")

        def begin(self, rollout: Rollout, step: int, asked: Any = None) -> Any:
            log.append("asked")
            return lambda: log.append("answered") or self.score(rollout, step)

    @dataclass(frozen=True)
    class Here(Fixed):
        def score(self, rollout: Rollout, step: int) -> Tensor:
            log.append("scored here")
            return super().score(rollout, step)

    rewards = RewardSet(models=[(Here("a", (1.0, 2.0)), 1.0), (Elsewhere("b", (3.0, 6.0)), 1.0)])
    finish = rewards.begin(rollout(2), step=1)
    assert log == ["asked", "scored here"]
    scored = finish(replace(rollout(2), ref_logprobs=torch.ones(2, 2)))
    assert log[2:] == ["answered"] and rewards_of(scored) == [2.0, 4.0] and scored.ref_logprobs is not None
    assert list(scored.scores) == ["a", "b"]


def test_how_far_models_disagree() -> None:
    """(1, 5) is 2 away from its mean, (2, 2) is 0, the unscorable row does not count, nor does a judge of weight 0."""
    models = [
        (Fixed("a", (1.0, 2.0, NAN)), 1.0),
        (Fixed("b", (5.0, 2.0, 0.0)), 3.0),
        (Fixed("judge", (9.0, 9.0, 9.0)), 0.0),
    ]
    rewards = RewardSet(models=models)
    assert rewards.metrics(rewards.score(rollout(), step=1))["reward/disagreement"] == 1.0
    alone = RewardSet(models=models[1:])
    assert "reward/disagreement" not in alone.metrics(alone.score(rollout(), step=1))


@pytest.mark.parametrize("how", ["mean", "min", "uwo"])
def test_a_row_one_model_cannot_score_is_unscorable(how: Any) -> None:
    rewards = RewardSet(models=[(Fixed("a", (1.0, NAN, 3.0)), 1.0), (Fixed("b", (1.0, 1.0, 1.0)), 1.0)], combine=how)
    scored = rewards.score(rollout(), step=1)
    assert scored.valid.tolist() == [True, False, True]
    assert math.isnan(rewards_of(scored)[1])
    assert rewards.metrics(scored)["reward/unscorable_rows"] == 1
    assert rewards.metrics(scored)["reward/a/unscorable_rows"] == 1
    assert "reward/b/unscorable_rows" not in rewards.metrics(scored)


def test_weight_zero_is_logged_and_has_no_say() -> None:
    rewards = RewardSet(
        models=[(Fixed("a", (1.0, 2.0, 3.0)), 1.0), (Fixed("gold-model", (NAN, 9.0, 9.0)), 0.0)],
        functions=[function("gold", [None, 7.0, 7.0], weight=0.0)],
        combine="min",
    )
    scored = rewards.score(rollout(), step=1)
    assert rewards_of(scored) == [1.0, 2.0, 3.0]
    assert scored.valid.tolist() == [True] * 3
    assert scored.scores["gold"].tolist()[1:] == [7.0, 7.0]
    assert rewards.metrics(scored)["reward/gold/unscorable_rows"] == 1


def test_unscorable_stays_out_of_a_function_sum_too() -> None:
    scored = RewardSet(functions=[function("f", [None, 1.0, 2.0])]).score(rollout(), step=1)
    assert scored.valid.tolist() == [False, True, True]
    assert rewards_of(scored)[1:] == [1.0, 2.0]


def test_clip_then_missing_stop_replaces() -> None:
    rewards = RewardSet(models=[(Fixed("a", (9.0, 9.0, -9.0)), 1.0)], clip=2.0, missing_eos_score=-5.0)
    scored = rewards.score(rollout(finished=[True, False, True]), step=1)
    assert rewards_of(scored) == [2.0, -5.0, -2.0]  # replaced after clipping, not lowered by 5
    assert scored.scores["a"].tolist() == [9.0, 9.0, -9.0]  # scores stay raw
    metrics = rewards.metrics(scored)
    assert metrics == {"reward/unscorable_rows": 0, "reward/missing_eos_rows": 1, "reward/clipped_rows": 2}


def test_missing_stop_can_be_left_alone() -> None:
    rewards = RewardSet(models=[(Fixed("a", (1.0, 2.0, 3.0)), 1.0)], missing_eos_score=None)
    scored = rewards.score(rollout(finished=[False] * 3), step=1)
    assert rewards_of(scored) == [1.0, 2.0, 3.0]
    assert rewards.metrics(scored)["reward/missing_eos_rows"] == 0


def test_an_unfinished_row_needs_no_score() -> None:
    rewards = RewardSet(models=[(Fixed("a", (NAN, 2.0, 3.0)), 1.0)], missing_eos_score=-1.0)
    scored = rewards.score(rollout(finished=[False, True, True]), step=1)
    assert rewards_of(scored) == [-1.0, 2.0, 3.0]
    assert bool(scored.valid.all())


def test_rows_invalid_before_stay_invalid() -> None:
    before = replace(rollout(), valid=torch.tensor([True, False, True]))
    scored = RewardSet(models=[(Fixed("a", (1.0, 2.0, 3.0)), 1.0)]).score(before, step=1)
    assert scored.valid.tolist() == [True, False, True]
    assert math.isnan(rewards_of(scored)[1])


def test_two_sources_of_one_name_are_both_kept() -> None:
    rewards = RewardSet(models=[(Fixed("rm", (1.0,) * 3), 1.0), (Fixed("rm", (3.0,) * 3), 1.0)])
    scored = rewards.score(rollout(), step=1)
    assert list(scored.scores) == ["rm", "rm-2"]
    assert rewards_of(scored) == [2.0] * 3


def test_what_functions_log_is_kept() -> None:
    def chatty(log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("passed", 1.0)
        log_metric("passed", 0.0)
        log_extra("verdict", ["good", "bad", "good"])
        return [1.0, 0.0, 1.0]

    rewards = RewardSet(functions=[FunctionReward("judge", chatty)])
    scored = rewards.score(rollout(), step=1)
    assert rewards.metrics(scored)["reward/judge/passed"] == 0.5
    assert rewards.extras() == {"verdict": ["good", "bad", "good"]}


@dataclass
class Twice:
    """A second rank that saw the same."""

    rank: int = 0
    world_size: int = 2

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat([value, value])

    def sum(self, value: Tensor) -> Tensor:
        return 2 * value

    def max(self, value: Tensor) -> Tensor:
        return value


def test_counts_are_summed_over_ranks() -> None:
    rewards = RewardSet(models=[(Fixed("a", (NAN, 9.0, 1.0)), 1.0)], clip=2.0)
    scored = rewards.score(rollout(), step=1)
    metrics = rewards.metrics(scored, Twice())
    assert metrics["reward/unscorable_rows"] == 2
    assert metrics["reward/clipped_rows"] == 2


def test_sets_without_a_say_are_refused() -> None:
    with pytest.raises(UserError, match="every reward source has weight 0"):
        RewardSet(models=[(Fixed("a", (1.0,)), 0.0)], functions=[function("f", [1.0], weight=0.0)])
    with pytest.raises(UserError, match=r"weights of reward.models \[1.0, -1.0\] sum to 0"):
        RewardSet(models=[(Fixed("a", (1.0,)), 1.0), (Fixed("b", (1.0,)), -1.0)])


def test_length_is_paid_for_beyond_the_limit_after_clipping_and_not_where_the_stop_is_missing() -> None:
    """Rows of 2 tokens, free up to 1, .25 a token: clip(3) = 1, minus .25; a cut completion has its own score."""
    rewards = RewardSet(
        functions=[function("f", [3.0, 0.5, 0.5])], clip=1.0, overlong=(1, 0.25), missing_eos_score=-1.0
    )
    scored = rewards.score(rollout(finished=[True, True, False]), step=1)
    assert rewards_of(scored) == [0.75, 0.25, -1.0]
    assert rewards.metrics(scored)["reward/overlong_rows"] == 3
    free = RewardSet(functions=[function("f", [3.0, 0.5, 0.5])], overlong=(2, 0.25))
    assert rewards_of(free.score(rollout(), step=1)) == [3.0, 0.5, 0.5]
