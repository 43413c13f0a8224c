"""Answers that can be checked: equal numbers however they are written, and no verdict where there is none to give."""

from __future__ import annotations

import pytest

from rlhf.rewards.verifiable import math_answer


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("48/2 = 24, and 24 + 48 = 72.\n#### 72", "72", 1.0),
        ("The answer is $\\boxed{\\frac{1}{2}}$.", "0.5", 1.0),
        ("That makes 1,200 dollars", "1200", 1.0),
        ("#### 71", "72", 0.0),
        ("I do not know.", "72", 0.0),
        ("#### 72", "nobody knows", None),  # the row has no answer: the completion cannot be scored
    ],
)
def test_the_last_answer_counts(completion: str, answer: str, score: float | None) -> None:
    assert math_answer([completion], [answer]) == [score]
    assert math_answer([[{"role": "assistant", "content": completion}]], [answer]) == [score]


def test_how_many_gave_an_answer_is_logged() -> None:
    logged: dict[str, float] = {}
    math_answer(["#### 1", "no"], ["1", "1"], log_metric=logged.__setitem__)
    assert logged == {"answered": 0.5}
