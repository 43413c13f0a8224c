from __future__ import annotations

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.overlap import overlap
from rlhf.rollout import Prompt, Turn


def asked(text: str, row: int = 0) -> Prompt:
    return Prompt(row_id=row, turns=(Turn(role="user", content=text),))


def test_held_out_prompts_that_were_trained_on_are_counted() -> None:
    train = [asked("a"), asked("b"), Prompt(row_id=2, text="plain")]
    held_out = [asked("c"), asked(" b\n", 1), Prompt(row_id=2, text="plain"), asked("b", 3)]
    found = overlap(train, held_out)
    assert found is not None
    assert (found.count, found.held_out, found.example) == (3, 4, "b")
    assert found.line().startswith("3 of 4 rows have a prompt that is in data.train too")
    assert overlap(train, held_out[:1]) is None
    assert overlap(train, []) is None


def test_texts_without_a_prompt_are_compared_themselves() -> None:
    def text(words: str) -> Demonstration:
        return Demonstration(Prompt(row_id=0), words)

    assert overlap([text("a"), text("b")], [text("c")]) is None
    found = overlap([text("a"), text("b")], [text("b "), text("c")])
    assert found is not None and (found.count, found.example) == (1, "b")
    pairs = overlap([Preference(Prompt(row_id=0), "x", "y")], [Preference(Prompt(row_id=0), "z", "y")])
    assert pairs is not None and pairs.count == 1
