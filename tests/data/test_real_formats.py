"""Rows in the shape in which data sets are published → prompts, demonstrations and preferences, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from rlhf.data.dropped import Dropped
from rlhf.data.formats import (
    TABLE,
    Asked,
    Format,
    Reply,
    Row,
    detect,
    texts,
    to_demonstrations,
    to_preferences,
    to_prompts,
)
from rlhf.data.formats.table import find, require
from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.scratch import EOS_ID, train_tokenizer
from rlhf.rollout import Prompt


def said(prompt: Prompt) -> list[str]:
    """``user: …`` lines, or the plain text alone."""
    return [f"{turn.role}: {turn.content}" for turn in prompt.turns] or [prompt.text]


def reasons(rows: list[dict[str, Any]], convert: Any = to_preferences, **settings: Any) -> dict[str, int]:
    dropped = Dropped()
    convert(rows, dropped=dropped, **settings)
    return dict(dropped.counts)


# ---- hh-rlhf

HH = {
    "chosen": "\n\nHuman: Hi there\n\nAssistant: Hello. What is it?\n\nHuman: A list:\n\n1. one\n\nAssistant: Fine.",
    "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello. What is it?\n\nHuman: A list:\n\n1. one\n\nAssistant: No.",
}


def test_hh_transcripts() -> None:
    (pair,) = to_preferences([HH])
    assert detect([HH]) == "hh_rlhf"
    assert said(pair.prompt) == ["user: Hi there", "assistant: Hello. What is it?", "user: A list:\n\n1. one"]
    assert (pair.chosen, pair.rejected, pair.margin) == ("Fine.", "No.", None)
    assert to_prompts([HH])[0] == pair.prompt
    assert to_demonstrations([HH])[0].completion == "Fine."


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Human: a\n\nHuman: b\n\nAssistant: c", "Human: a\n\nHuman: b\n\nAssistant: d", "same role twice in a row"),
        ("Human: a\n\nAssistant:", "Human: a\n\nAssistant: d", "chosen: an empty turn"),
        ("Human: a\n\nAssistant: c", "Human: b\n\nAssistant: d", "answer different conversations"),
        ("Human: a\n\nAssistant: c", "Human: a\n\nAssistant: c\n\nHuman: e\n\nAssistant: d", "different conversations"),
        ("Human: a\n\nAssistant: c", "Human: a\n\nAssistant: c ", "chosen and rejected are the same"),
        ("Human: a\n\nAssistant: c\n\nHuman: more", "Human: a\n\nAssistant: d", "does not end with an assistant turn"),
        ("Assistant: a", "Assistant: b", "the prompt does not end with a user turn"),
        (
            "Assistant: a\n\nHuman: b\n\nAssistant: c",
            "Assistant: a\n\nHuman: b\n\nAssistant: d",
            "start with a user turn",
        ),
        ("Once. Human: a\n\nAssistant: b", "Human: a\n\nAssistant: d", "text before the first"),
    ],
)
def test_hh_rows_that_a_template_would_refuse(chosen: str, rejected: str, reason: str) -> None:
    dropped = Dropped()
    bad = {"chosen": f"\n\n{chosen}", "rejected": f"\n\n{rejected}"}
    assert len(to_preferences([HH, bad, HH], dropped=dropped)) == 2
    (line,) = dropped.lines()
    assert reason in line and line.endswith("1 (first: row 1)")


# ---- UltraFeedback

BINARIZED = {
    "prompt": "Name a colour.",
    "prompt_id": "f1",
    "chosen": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}],
    "rejected": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "No."}],
    "messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}],
    "score_chosen": 8.5,
    "score_rejected": 7.0,
}


def test_ultrafeedback_binarized_is_a_preference() -> None:
    (pair,) = to_preferences([BINARIZED])
    assert detect([BINARIZED]) == "preference"
    assert said(pair.prompt) == ["user: Name a colour."]
    assert (pair.chosen, pair.rejected, pair.margin) == ("Blue.", "No.", 1.5)
    assert pair.prompt.columns == {"prompt_id": "f1", "score_chosen": 8.5, "score_rejected": 7.0}
    assert reasons([BINARIZED | {"score_rejected": 8.5}, BINARIZED]) == {"chosen is not rated above rejected": 1}


def rated(response: str, *ratings: str, overall: float | None = None) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    notes = {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(aspects, ratings, strict=False)}
    return {"model": "m", "response": response, "annotations": notes, "overall_score": overall}


def ultrafeedback(*completions: dict[str, Any]) -> dict[str, Any]:
    return {"source": "s", "instruction": "Name a colour.", "models": ["m"], "completions": list(completions)}


def test_ultrafeedback_compares_the_best_with_the_worst() -> None:
    middle, best, worst = rated("Red.", "3", "4"), rated("Blue.", "5", "N/A", "4"), rated("No.", "1", "2", overall=10.0)
    row = ultrafeedback(middle, best, worst)
    (pair,) = to_preferences([row])
    assert detect([row]) == "ultrafeedback"
    assert said(pair.prompt) == ["user: Name a colour."]
    assert (pair.chosen, pair.rejected, pair.margin) == ("Blue.", "No.", 4.5 - 1.5)  # not by the overall score of 10
    assert to_demonstrations([row])[0].completion == "Blue."
    assert to_prompts([row])[0].columns == {"source": "s", "models": ["m"]}


def test_ultrafeedback_without_a_winner() -> None:
    ties = ultrafeedback(rated("a", "3"), rated("b", "3"))
    unrated = ultrafeedback(rated("a"), rated("", "5"))
    overall = ultrafeedback(rated("a", overall=2.0), rated("b", overall=7.5), rated("c"))
    assert reasons([overall, ties, unrated, ultrafeedback(), ties | {"completions": "x"}]) == {
        "all completions are rated the same": 1,
        "no completion has both a response and a rating": 2,
        "completions is not a list of responses with ratings": 1,
    }
    assert to_preferences([overall])[0].margin == 5.5


# ---- summaries

POST = {"id": "t3", "post": "I ate it all. ", "title": "A cake", "subreddit": "food", "site": None, "article": None}
COMPARISON = {
    "info": POST,
    "summaries": [{"text": " Ate a cake."}, {"text": "No more cake. "}],
    "choice": 1,
    "worker": "w",
}


def test_summaries_continue_the_prompt_with_a_space() -> None:
    (pair,) = to_preferences([COMPARISON])
    assert detect([COMPARISON]) == "summaries"
    assert pair.prompt.text == "SUBREDDIT: r/food\nTITLE: A cake\nPOST: I ate it all.\nTL;DR:"
    assert (pair.chosen, pair.rejected) == (" No more cake.", " Ate a cake.")
    assert to_demonstrations([COMPARISON])[0].completion == " No more cake."
    assert pair.prompt.columns == {"worker": "w"}


def test_summaries_of_articles_and_broken_comparisons() -> None:
    article = COMPARISON | {"info": {"article": "It rained.", "title": "Rain", "site": "cnn", "post": None}}
    assert to_prompts([article])[0].text == "TITLE: Rain\nARTICLE: It rained.\nTL;DR:"
    bad: list[dict[str, Any]] = [{"choice": 2}, {"summaries": []}, {"info": {}}, {"info": "x"}, {"choice": True}]
    bad += [{"summaries": [{"text": "a"}, {"text": " a "}]}, {"summaries": [{"text": "a"}, {}]}]
    assert reasons([COMPARISON] * 8 + [COMPARISON | change for change in bad]) == {
        "choice is neither 0 nor 1": 2,
        "summaries are not two": 1,
        "info has neither a post nor an article": 1,
        "info is not an object": 1,
        "chosen and rejected are the same": 1,
        "no column 'a summary'": 1,
    }


def test_tldr_is_one_text_with_an_end() -> None:
    """The reply's own space is its first character, nothing is added between, and EOS follows."""
    row = {"prompt": "POST: I ate it all.\n\nTL;DR:", "completion": " Ate a cake."}
    tokenizer = train_tokenizer([*row.values()] * 3, 300)
    (example,) = to_demonstrations([row])
    assert detect([row]) == "completion" and example.prompt.text == row["prompt"]
    ids = render_prompt(tokenizer, example.prompt) + render_completion(tokenizer, example.prompt, example.completion)
    assert tokenizer.decode(ids) == "<bos>POST: I ate it all.\n\nTL;DR: Ate a cake.<eos>"
    assert ids.count(EOS_ID) == 1


# ---- HelpSteer2


def steer(prompt: str, response: str, helpfulness: int, **others: Any) -> dict[str, Any]:
    ratings = {"helpfulness": helpfulness, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    return {"prompt": prompt, "response": response, **ratings, **others}


def test_helpsteer_pairs_the_rows_of_a_prompt() -> None:
    rows = [steer("a", "bad", 1), steer("a", "good", 3), steer("b", "x", 2), steer("b", "y", 2), steer("c", "z", 4)]
    assert detect(rows) == "helpsteer"
    dropped = Dropped()
    (pair,) = to_preferences(rows, dropped=dropped, first_row_id=10)
    assert (said(pair.prompt), pair.prompt.row_id) == (["user: a"], 10)
    assert (pair.chosen, pair.rejected, pair.margin) == ("good", "bad", 2.0)
    assert dict(dropped.counts) == {
        "the responses to its prompt are rated the same": 1,
        "the only response to its prompt: nothing to compare it with": 1,
    }
    assert [example.completion for example in to_demonstrations(rows)] == ["bad", "good", "x", "y", "z"]


def test_helpsteer_samples_each_prompt_once() -> None:
    rows = [steer("a", "bad", 1), steer("a", "good", 3), steer("b", "x", 2)]
    dropped = Dropped()
    prompts = to_prompts(rows, dropped=dropped)
    assert [said(prompt) for prompt in prompts] == [["user: a"], ["user: b"]]
    assert dropped.counts == {"another response to a prompt that came before": 1}
    assert prompts[0].columns["helpfulness"] == 1 and "response" not in prompts[0].columns


def test_helpsteer_turns_inside_the_prompt() -> None:
    row = steer("c#\n<extra_id_1>Assistant\nWhat about it?\n<extra_id_1>User\nwhat is it", "A language.", 4)
    assert said(to_prompts([row])[0]) == ["user: c#", "assistant: What about it?", "user: what is it"]
    unanswered = steer("c#\n<extra_id_1>Assistant\nWhat about it?", "x", 4)
    assert reasons([row, unanswered], to_prompts) == {"the prompt does not end with a user turn": 1}
    assert reasons([row, row | {"helpfulness": None}, row | {"response": " "}], to_demonstrations) == {
        "response is empty": 1
    }


# ---- ShareGPT, Alpaca, GSM8K


def share(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_sharegpt() -> None:
    row = share(("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello!"), ("human", "Bye"), ("gpt", "So long."))
    (example,) = to_demonstrations([row])
    assert detect([row]) == "sharegpt"
    assert said(example.prompt) == ["system: Be kind.", "user: Hi", "assistant: Hello!", "user: Bye"]
    assert (example.completion, example.prompt.columns) == ("So long.", {"id": "x"})
    roles = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    assert to_demonstrations([roles])[0].completion == "Hello!"
    bad = [share(("gpt", "a"), ("human", "b"), ("gpt", "c")), share(("human", "a"), ("human", "b")), share()]
    bad += [share(("human", "a"), ("tool", "b")), share(("human", "a")), {"conversations": ["a"]}]
    assert reasons([row] * 7 + bad, to_demonstrations) == {
        "the conversation does not start with a user turn": 1,
        "conversations: the same role twice in a row": 1,
        "conversations is not a list of turns": 1,
        "conversations: role 'tool' is not system, user or assistant": 1,
        "conversations does not end with an assistant turn": 1,
        "conversations: a turn without from and value": 1,
    }


def test_alpaca() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "text": "Below is an instruction…"}
    (example,) = to_demonstrations([row])
    assert detect([row]) == "alpaca"
    assert (said(example.prompt), example.completion) == (["user: Translate.\n\nHaus"], "house")
    assert said(to_prompts([row | {"input": ""}])[0]) == ["user: Translate."]
    assert said(to_prompts([{"instruction": "Go.", "output": "x"}])[0]) == ["user: Go."]
    bad = [row | {"output": ""}, row | {"instruction": None}, row | {"input": 5}]
    assert reasons([row] * 4 + bad, to_demonstrations) == {
        "output is empty": 1,
        "no column 'instruction'": 1,
        "input is not text": 1,
    }


GSM = {"question": "6 eggs at 180?", "answer": "6 * 180 = <<6*180=1080>>1080 cents.\nIn all.\n#### 1,080"}


def test_gsm8k() -> None:
    (example,) = to_demonstrations([GSM])
    assert detect([GSM]) == "gsm8k"
    assert said(example.prompt) == ["user: 6 eggs at 180?"]
    assert example.completion == "6 * 180 = 1080 cents.\nIn all.\n#### 1,080"
    assert to_prompts([GSM])[0].columns == {"answer": GSM["answer"], "final_answer": "1080"}
    assert reasons([GSM, GSM, GSM | {"answer": "about 5"}], to_prompts) == {"answer has no final number after ####": 1}
    assert reasons([GSM, GSM | {"answer": "####"}], to_prompts, format="gsm8k") == {
        "answer has no final number after ####": 1
    }


# ---- what rows serve, and formats from outside


@pytest.mark.parametrize(
    ("row", "use", "message"),
    [
        ({"prompt": "q"}, to_demonstrations, r"prompt \(prompt\) have no replies to imitate, which sft.*alpaca"),
        (
            {"prompt": "q"},
            to_preferences,
            r"nothing to compare, which reward and dpo.*hh_rlhf \(chosen \+ rejected\).*text \(text",
        ),
        (GSM, to_preferences, "gsm8k .* have nothing to compare"),
    ],
)
def test_rows_that_cannot_serve_name_the_formats_that_can(row: dict[str, Any], use: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        use([row])


def test_a_column_that_differs_by_case_is_named() -> None:
    with pytest.raises(UserError, match=r"for example \{prompt: Prompt, completion: Completion\}"):
        detect([{"Prompt": "a", "Completion": "b"}])


def test_columns_full_of_none_are_no_columns() -> None:
    assert detect([{"prompt": "a", "chosen": None, "rejected": None, "completion": "b"}]) == "completion"
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert reasons([good, good, good | {"rejected": None}]) == {"no column 'rejected'": 1}


def test_one_label_alone_gives_no_pairs() -> None:
    assert reasons([{"text": "a", "label": 1}, {"text": "b", "label": 1}]) == {
        "no text of the other label to compare with": 2
    }


def test_tokenizers_learn_from_every_format() -> None:
    assert texts(HH)[-2:] == ["Fine.", "No."]
    assert texts(GSM)[0] == "6 eggs at 180?"
    assert texts(steer("a", "b", 1)) == ["a", "b"]
    assert texts({"prompt": "q"}) == ["q"] and texts({"prompt": 5}) == []


@dataclass(frozen=True)
class Riddle(Format):
    """What docs/data.md shows: a format of one's own."""

    name: ClassVar[str] = "riddle"
    columns: ClassVar[tuple[str, ...]] = ("riddle", "solution")

    def prompt(self, row: Row) -> Asked:
        return f"Riddle: {row['riddle']}\nSolution:"

    def demonstration(self, row: Row) -> Reply:
        return Reply(self.prompt(row), f" {row['solution']}")


def not_a_format() -> dict[str, Any]:
    return {}


def test_a_format_from_outside() -> None:
    rows = [{"riddle": "What has keys?", "solution": "A piano.", "level": 2}]
    (example,) = to_demonstrations(rows, format=f"{__name__}:Riddle")
    assert (example.prompt.text, example.completion) == ("Riddle: What has keys?\nSolution:", " A piano.")
    assert example.prompt.columns == {"level": 2}
    assert reasons([*rows, {"riddle": "x"}, *rows], to_demonstrations, format=f"{__name__}:Riddle") == {
        "no column 'solution'": 1
    }
    with pytest.raises(UserError, match=r"riddle .* have nothing to compare"):
        to_preferences(rows, format=f"{__name__}:Riddle")
    with pytest.raises(UserError, match=r"is no rlhf\.data\.formats\.Format \(dict\)"):
        find(rows, f"{__name__}:not_a_format")
    with pytest.raises(UserError, match="did you mean 'Riddle'"):
        find(rows, f"{__name__}:Ridle")


def test_every_format_serves_something_and_says_how_it_is_recognised() -> None:
    for entry in TABLE:
        assert entry.columns and entry.name and entry.serves("prompts")
        assert (type(entry).__doc__ or "").strip()
    with pytest.raises(UserError, match="cannot do without"):
        require(TABLE[-2], "preferences")
