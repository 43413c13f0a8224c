from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.dropped import Dropped
from rlhf.data.formats import detect, texts, to_demonstrations, to_preferences, to_prompts
from rlhf.errors import UserError
from rlhf.rollout import Turn


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Letters:
    """A tokenizer whose tokens are characters, except that the pair "qu" is one token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text.replace("qu", "\u0100")]

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = True) -> str:
        assert not clean_up_tokenization_spaces
        return "".join(map(chr, ids)).replace("\u0100", "qu")


@pytest.mark.parametrize(
    ("columns", "name", "found"),
    [
        ({"prompt", "chosen", "rejected", "messages"}, "auto", "preference"),
        ({"messages", "text"}, "auto", "messages"),
        ({"prompt", "completion"}, "auto", "completion"),
        ({"prompt", "answer"}, "auto", "prompt"),
        ({"text", "label"}, "auto", "text"),
        ({"prompt", "completion"}, "prompt", "prompt"),
        ({"prompt", "completion"}, "chat", "completion"),
    ],
)
def test_the_format_is_found_by_columns(columns: set[str], name: str, found: str) -> None:
    rows: list[dict[str, Any]] = [dict.fromkeys(columns, "x") for _ in range(3)]
    assert detect([{"prompt": "a row that lacks the rest"}, *rows], name) == found


def test_unknown_formats_and_columns_are_named() -> None:
    with pytest.raises(UserError, match="format 'sharegtp' is not known"):
        detect([{"text": "x"}], "sharegtp")
    with pytest.raises(UserError, match=r"has columns \['answer', 'question'\].*data\.\*\.columns"):
        detect([{"question": "x", "answer": "y"}])
    with pytest.raises(UserError, match="messages would be needed"):
        detect([{"text": "x"}], "messages")


def test_messages_give_prompts_and_demonstrations() -> None:
    conversation = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c"), assistant("d")]
    rows = [{"messages": conversation, "source": "s"}]
    prompt = to_prompts(rows, first_row_id=5)[0]
    assert [turn.content for turn in prompt.turns] == ["be kind", "a", "b", "c"]
    assert (prompt.row_id, prompt.columns) == (5, {"source": "s"})
    demonstration = to_demonstrations(rows)[0]
    assert (demonstration.prompt.turns, demonstration.completion) == (prompt.turns, "d")
    assert to_prompts([{"messages": conversation[:-1]}])[0].turns == prompt.turns  # no reply yet: nothing to cut off


def test_text_columns_stay_plain_unless_chat_is_asked_for() -> None:
    rows = [{"prompt": "Once", "completion": " upon"}]
    plain = to_demonstrations(rows)[0]
    assert (plain.prompt.text, plain.prompt.turns, plain.completion) == ("Once", (), " upon")
    chat = to_demonstrations(rows, format="chat")[0]
    assert (chat.prompt.text, chat.prompt.turns) == ("", (Turn(role="user", content="Once"),))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [user("q")], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": [user("q")], "chosen": [user("q"), assistant("good")], "rejected": [assistant("bad")]},
    ],
)
def test_every_way_to_write_a_conversational_preference(row: dict[str, Any]) -> None:
    pair = to_preferences([row])[0]
    assert pair.prompt.turns == (Turn(role="user", content="q"),)
    assert (pair.chosen, pair.rejected, pair.margin) == ("good", "bad", None)
    assert to_demonstrations([row])[0].completion == "good"
    assert to_prompts([row])[0] == pair.prompt


def test_plain_preferences_and_margins() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert to_preferences([row])[0].prompt.text == "q"
    assert to_preferences([row | {"margin": 2}])[0].margin == 2.0
    assert to_preferences([row | {"score_chosen": 8.5, "score_rejected": 6.0}])[0].margin == 2.5


GOOD = {"prompt": [user("q")], "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": "bad"}, "chosen and rejected are the same"),
        ({"chosen": " "}, "chosen is empty"),
        ({"prompt": []}, "prompt is not a list of turns"),
        ({"prompt": [user("a"), user("b")]}, "prompt: the same role twice in a row"),
        ({"prompt": [user("a"), assistant("b")]}, "the prompt does not end with a user turn"),
        ({"prompt": [assistant("a"), user("b")]}, "the conversation does not start with a user turn"),
        ({"prompt": [user("")]}, "prompt: an empty turn"),
        ({"prompt": [{"role": "human", "content": "a"}]}, "prompt: role 'human' is not system, user or assistant"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt: content is not text"),
        ({"prompt": [{"from": "user"}]}, "prompt: a turn without role and content"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "prompt has nothing but a system turn"),
        ({"prompt": [user("a"), {"role": "system", "content": "s"}]}, "prompt: a system turn after the first one"),
        ({"chosen": [user("other"), assistant("x")]}, "prompt and chosen disagree about the turns before the reply"),
        ({"chosen": [user("q")]}, "chosen does not end with an assistant turn"),
        ({"margin": "large"}, "margin is not a number"),
        ({"margin": 0}, "chosen is not rated above rejected"),
        ({"prompt": None}, "no prompt, and chosen is plain text: what they share cannot be told apart"),
    ],
)
def test_a_bad_row_is_counted_with_its_reason_and_the_others_stay(changes: dict[str, Any], reason: str) -> None:
    dropped = Dropped()
    pairs = to_preferences([GOOD, GOOD | changes, GOOD], dropped=dropped)
    assert [pair.prompt.row_id for pair in pairs] == [0, 2]
    assert dropped.lines() == [f"{reason}: 1 (first: row 1)"]


def test_different_conversations_are_no_preference() -> None:
    dropped = Dropped()
    row = {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    assert to_preferences([row], dropped=dropped) == []
    assert list(dropped.counts) == ["chosen and rejected answer different conversations"]


def test_a_column_that_one_row_lacks() -> None:
    dropped = Dropped()
    found = to_preferences([GOOD, {"prompt": "q", "chosen": "x"}, GOOD], dropped=dropped, where=lambda i: f"f:{i + 1}")
    assert len(found) == 2
    assert dropped.lines() == ["no column 'rejected': 1 (first: f:2)"]


def test_plain_text_is_cut_into_prompts() -> None:
    dropped = Dropped()
    rows: list[dict[str, Any]] = [{"text": "abcdef", "label": 1}, {"text": "abc"}, {"text": "quiet"}, {"text": 7}]
    prompts = to_prompts(rows, tokenizer=Letters(), prompt_tokens=3, dropped=dropped)
    assert [(prompt.text, prompt.row_id) for prompt in prompts] == [("abc", 0), ("quie", 2)]
    assert prompts[0].columns == {"label": 1}
    assert dropped.counts == {"text has no more than 3 tokens": 1, "text is empty or not a string": 1}


def test_a_cut_that_does_not_round_trip_is_dropped() -> None:
    class Merging(Letters):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text, add_special_tokens) if len(text) != 2 else [0]

    dropped = Dropped()
    assert to_prompts([{"text": "abc"}], tokenizer=Merging(), prompt_tokens=2, dropped=dropped) == []
    assert dropped.counts == {"the cut text encodes to other tokens": 1}


def test_plain_text_needs_a_length() -> None:
    with pytest.raises(UserError, match=r"data\.prompt_tokens"):
        to_prompts([{"text": "abc"}])


def test_plain_text_is_a_demonstration_without_a_prompt() -> None:
    demonstration = to_demonstrations([{"text": "a film", "label": 0}])[0]
    assert (demonstration.prompt.text, demonstration.prompt.turns) == ("", ())
    assert demonstration.completion == "a film"


def test_labelled_text_is_paired_each_row_once_and_anew_each_epoch() -> None:
    labels: list[Any] = [1, "0", True, "negative", "pos", 0, "positive", False, 1]
    rows = [{"text": f"{index}{label}", "label": label} for index, label in enumerate(labels)]
    positive = {row["text"] for row in rows if str(row["label"]).lower() in ("1", "true", "pos", "positive")}
    epochs = [to_preferences(rows, seed=1, epoch=epoch) for epoch in range(8)]
    for pairs in epochs:
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        assert len(pairs) == 4  # five positive, four negative
        assert set(chosen) < positive
        assert len({*chosen, *rejected}) == 8
        assert all(pair.prompt.text == "" and not pair.prompt.turns for pair in pairs)
    assert len({tuple(pair.chosen for pair in pairs) for pairs in epochs}) > 1
    assert len({pair.chosen for pairs in epochs for pair in pairs}) == 5  # nobody waits for ever
    assert to_preferences(rows, seed=1, epoch=3) == epochs[3]


def test_labels_that_mean_nothing_are_counted() -> None:
    dropped = Dropped()
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
        {"text": "c", "label": 2},
        {"text": "d"},
    ]
    assert len(to_preferences(rows, dropped=dropped)) == 1
    assert dropped.total == 2


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"messages": [user("a"), assistant("b")]}])
def test_rows_that_cannot_be_preferences(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="chosen"):
        to_preferences([row])


def test_prompts_cannot_be_demonstrations() -> None:
    with pytest.raises(UserError, match="no replies to imitate"):
        to_demonstrations([{"prompt": "q"}])


def test_texts_finds_every_piece() -> None:
    row = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c", "label": 1, "text": None}
    assert texts(row) == ["a", "b", "c"]
