"""Reward functions: what they are given (TRL's signature) and the only answers that are taken for scores."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import UserError
from rlhf.rewards.functions import FunctionReward, TrainerState, checked_scores
from rlhf.rollout import Prompt, Rollout, Turn

CHAT = Prompt(row_id=0, turns=(Turn(role="user", content="Hi"),), columns={"answer": 4, "topic": "sums"})
PLAIN = Prompt(row_id=1, text="Once", columns={"answer": 5})


def rollout(*prompts: Prompt) -> Rollout:
    rows = len(prompts)
    return Rollout.from_ids(
        [[2, 3]] * rows,
        [[5] * (row + 1) + [1] for row in range(rows)],
        prompts=prompts,
        texts=tuple(f"reply {row}" for row in range(rows)),
        sample=torch.zeros(rows, dtype=torch.long),
        finished=torch.ones(rows, dtype=torch.bool),
    )


def test_a_function_is_given_what_trl_gives() -> None:
    seen: dict[str, Any] = {}

    def function(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions)
        kwargs["log_extra"]("length", [len(ids) for ids in kwargs["completion_ids"]])
        kwargs["log_metric"]("tries", 1)
        kwargs["log_metric"]("tries", 2)
        return [1, 2.5]

    reward = FunctionReward("mine", function, max_steps=30)
    assert reward.score(rollout(CHAT, PLAIN), step=7).tolist() == [1.0, 2.5]
    assert seen["prompts"] == [[{"role": "user", "content": "Hi"}], "Once"]
    assert seen["completions"] == [[{"role": "assistant", "content": "reply 0"}], "reply 1"]
    assert seen["completion_ids"] == [[5, 1], [5, 5, 1]]
    assert seen["trainer_state"] == TrainerState(global_step=7, max_steps=30)
    assert seen["answer"] == [4, 5]
    assert seen["topic"] == ["sums", None]
    assert reward.log.extras == {"length": [2, 3]}
    assert reward.log.values == {"tries": [1.0, 2.0]}


def test_functions_of_trl_run_as_they_are() -> None:
    from trl.rewards import accuracy_reward, think_format_reward

    said = ("<think>\n2 + 2\n</think>\nIt is 4.", "It is 4.", "<think>4")
    rows = replace(rollout(CHAT, CHAT, CHAT), texts=said)
    assert FunctionReward("format", think_format_reward).score(rows, 1).tolist() == [1.0, 0.0, 0.0]
    solved = replace(CHAT, columns={"solution": r"$\frac{63}{400}$"})
    rows = replace(rollout(solved, solved), texts=(r"\boxed{\frac{63}{400}}", r"\boxed{\frac{64}{400}}"))
    reward = FunctionReward("accuracy", accuracy_reward)
    assert reward.score(rows, 1).tolist() == [1.0, 0.0]
    assert set(reward.log.extras) and all(len(column) == 2 for column in reward.log.extras.values())


def test_what_was_logged_belongs_to_one_call() -> None:
    def function(trainer_state: TrainerState, log_metric: Any, **_: Any) -> list[float]:
        if trainer_state.global_step == 1:
            log_metric("only_then", 3.0)
        return [0.0]

    reward = FunctionReward("mine", function)
    reward.score(rollout(PLAIN), step=1)
    assert reward.log.values == {"only_then": [3.0]}
    reward.score(rollout(PLAIN), step=2)
    assert reward.log.values == {}


def test_a_function_gets_only_the_arguments_it_has() -> None:
    assert FunctionReward("f", lambda completions, answer: answer).score(rollout(CHAT, PLAIN), 1).tolist() == [4, 5]
    assert FunctionReward("f", lambda completions, hint=3: [hint] * 2).score(rollout(CHAT, PLAIN), 1).tolist() == [3, 3]
    with pytest.raises(UserError, match=r"f asks for label, which the rows do not have; they have answer, topic"):
        FunctionReward("f", lambda completions, label: label).score(rollout(CHAT, PLAIN), 1)


def test_a_column_cannot_take_the_place_of_an_argument() -> None:
    prompt = replace(PLAIN, columns={"completions": "other", "prompts": "other"})
    given = FunctionReward("f", lambda completions, **_: [float(completions == ["reply 0"])])
    assert given.score(rollout(prompt), 1).tolist() == [1.0]


def test_async_functions_share_one_loop_and_may_run_inside_another() -> None:
    loops = []

    async def function(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    reward = FunctionReward("later", function)
    assert reward.score(rollout(PLAIN), 1).tolist() == [7.0]

    async def notebook() -> list[float]:
        return reward.score(rollout(PLAIN), 1).tolist()

    assert asyncio.run(notebook()) == [7.0]
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2],
        (1.0, 2),
        np.array([1.0, 2.0], dtype=np.float32),
        torch.tensor([1, 2]),
        [np.float32(1), np.int64(2)],
        [torch.tensor(1.0), np.array(2.0)],
        [Fraction(1), 2],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_in_any_usual_container_are_scores(returned: Any) -> None:
    assert checked_scores("f", returned, 2) == [1.0, 2.0]


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, 1e39], ids=lambda value: str(value)[:9]
)
def test_none_and_what_is_not_finite_is_unscorable_and_never_zero(value: Any) -> None:
    scores = FunctionReward("f", lambda **_: [value, 0.5]).score(rollout(CHAT, PLAIN), 1)
    assert scores.dtype == torch.float32
    assert math.isnan(scores[0].item())
    assert scores[1].item() == 0.5


async def _inner() -> list[float]:
    return [1.0, 2.0]


WRONG: dict[str, Any] = {
    "None": None,
    "one number": 1.0,
    "one bool": True,
    "string": "1.0",
    "string of the right length": "12",
    "bytes": b"12",
    "too few": [1.0],
    "too many": [1.0, 2.0, 3.0],
    "empty": [],
    "bool": [True, False],
    "numpy bool": np.array([True, False]),
    "number as a string": ["0.5", 1.0],
    "nested": [[1.0], [2.0]],
    "two columns": np.ones((2, 2)),
    "zero-dimensional tensor": torch.tensor(1.0),
    "mapping": {"score": [1.0, 2.0]},
    "mapping in a list": [{"score": 1.0}, {"score": 2.0}],
    "set": {1.0, 2.0},
    "iterator": iter([1.0, 2.0]),
    "generator": (score for score in (1.0, 2.0)),
    "complex": [1j, 2.0],
    "decimal": [Decimal(1), 2.0],
    "function": [len, 1.0],
    "scores and names": ([1.0, 2.0], ["a", "b"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_other_answer_is_refused_by_name(case: str) -> None:
    with pytest.raises(UserError, match=r"^reward function package:mine returned .*return a list of 2 numbers") as info:
        FunctionReward("package:mine", lambda **_: WRONG[case]).score(rollout(CHAT, PLAIN), 1)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 250


def test_the_message_shows_what_came_back() -> None:
    with pytest.raises(UserError, match=r"returned True \(bool\) for row 1;"):
        checked_scores("f", [1.0, True], 2)
    with pytest.raises(UserError, match=r"returned 3 scores for 2 completions"):
        checked_scores("f", [1.0, 2.0, 3.0], 2)
    with pytest.raises(UserError, match=r"returned None \(NoneType\)"):
        checked_scores("f", None, 2)


def test_an_exception_of_the_function_names_the_function() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(KeyError) as info:
        FunctionReward("package:broken", broken).score(rollout(PLAIN), 4)
    assert info.value.__notes__ == ["raised by the reward function package:broken at step 4"]


def test_wrong_log_calls_are_refused() -> None:
    def extra(log_extra: Any, **_: Any) -> list[float]:
        log_extra("column", [1])
        return [0.0, 0.0]

    def metric(log_metric: Any, **_: Any) -> list[float]:
        log_metric("name", "high")
        return [0.0, 0.0]

    with pytest.raises(UserError, match=r"log_extra\('column', …\) got 1 values for 2 completions"):
        FunctionReward("f", extra).score(rollout(CHAT, PLAIN), 1)
    with pytest.raises(UserError, match=r"log_metric\('name', …\) got 'high' \(str\)"):
        FunctionReward("f", metric).score(rollout(CHAT, PLAIN), 1)
