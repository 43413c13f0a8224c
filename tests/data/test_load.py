from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.dropped import Dropped
from rlhf.data.limits import within_length
from rlhf.data.load import SourceSpec, load_demonstrations, load_preferences, load_prompts, training_texts
from rlhf.errors import UserError
from rlhf.models.chat import render_prompt
from rlhf.models.scratch import train_tokenizer
from rlhf.rollout import Prompt

TEXTS = ["a long question about the weather", "and an answer", "one two three four five six seven eight"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS * 4, 320)


def source(path: Path, rows: list[Any], **settings: Any) -> SourceSpec:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return SourceSpec(path=str(path), **settings)


def test_sources_follow_each_other_and_weights_repeat_them(tmp_path: Path) -> None:
    first = source(tmp_path / "a.jsonl", [{"prompt": "a"}, "broken", {"prompt": ""}, {"prompt": "b"}])
    second = source(tmp_path / "b.jsonl", [{"question": "c"}], weight=2.0, columns={"prompt": "question"})
    prompts, report = load_prompts([first, second])
    assert [(prompt.text, prompt.row_id) for prompt in prompts] == [("a", 0), ("b", 2), ("c", 3), ("c", 3)]
    assert [(part.read, part.used, part.dropped.total) for part in report.sources] == [(4, 2, 2), (1, 1, 0)]
    assert report.lines()[0] == (
        f"{first.path}: 2 of 4 rows used as prompt; "
        f"not valid JSON: 1 (first: {first.path}:2: Expecting value: line 1 column 1 (char 0)); "
        f"the prompt is empty: 1 (first: {first.path}:3)"
    )


def test_no_usable_row_names_the_file_and_the_reasons(tmp_path: Path) -> None:
    empty = source(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=r"empty\.jsonl has no usable row: it has no rows"):
        load_prompts([empty])
    bad = source(tmp_path / "bad.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "x"}])
    with pytest.raises(UserError, match=r"bad\.jsonl has no usable row: chosen and rejected are the same: 1"):
        load_preferences([bad])


def test_long_prompts_are_dropped_or_lose_their_beginning(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], TEXTS, strict=True)]
    rows = [{"prompt": turns}, {"prompt": turns[2:]}, {"prompt": TEXTS[2]}]
    spec = source(tmp_path / "a.jsonl", rows)
    full = [len(render_prompt(tokenizer, prompt)) for prompt in load_prompts([spec])[0]]
    limit = full[1] - 2
    kept, report = load_prompts([spec], tokenizer=tokenizer, max_prompt_tokens=limit)
    assert [prompt.row_id for prompt in kept] == [2]
    assert report.sources[0].dropped.counts == {f"prompt longer than {limit} tokens": 2}

    cut, report = load_prompts([spec], tokenizer=tokenizer, max_prompt_tokens=limit, long_prompts="truncate_left")
    assert [prompt.row_id for prompt in cut] == [0, 1, 2]
    assert all(len(render_prompt(tokenizer, prompt)) <= limit for prompt in cut)
    assert len(cut[0].turns) == 1  # whole turns went first
    assert TEXTS[2].endswith(cut[0].turns[0].content) and cut[0].turns[0].content.endswith("seven eight")
    assert cut[2].text == TEXTS[2]  # it fitted


def test_a_cut_is_measured_again() -> None:
    class Prefixing:
        """Puts a token of its own in front of every text, as SentencePiece does; it is not text."""

        bos_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0, *map(ord, text)]

        def decode(self, ids: list[int], **settings: Any) -> str:
            return "".join(chr(token) for token in ids if token)

    dropped = Dropped()
    cut = within_length([Prompt(row_id=0, text="abcdef")], Prefixing(), 4, "truncate_left", dropped)
    assert [prompt.text for prompt in cut] == ["def"]  # three letters and the prefix
    assert within_length(cut, Prefixing(), 1, "truncate_left", dropped) == []
    assert dropped.counts == {"prompt longer than 1 tokens": 1}


def test_what_no_cut_can_fit_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    spec = source(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "x"}])
    kept, report = load_prompts([spec], tokenizer=tokenizer, max_prompt_tokens=3, long_prompts="truncate_left")
    assert [prompt.text for prompt in kept] == ["x"]
    assert report.sources[0].dropped.total == 1


def test_a_special_token_in_the_text_costs_the_row_and_not_the_run(tmp_path: Path, tokenizer: Any) -> None:
    spec = source(tmp_path / "a.jsonl", [{"prompt": "sneaky <bos> here"}, {"prompt": "fine"}])
    kept, report = load_prompts([spec], tokenizer=tokenizer)
    assert [prompt.text for prompt in kept] == ["fine"]
    assert "2 BOS tokens" in report.sources[0].dropped.examples["cannot be rendered"]


@pytest.mark.parametrize("load", [load_prompts, load_demonstrations])
def test_system_turns_follow_the_setting(tmp_path: Path, tokenizer: Any, load: Any) -> None:
    roles = ["system", "user", "assistant"]
    messages = [{"role": role, "content": role[0]} for role in roles]
    spec = source(tmp_path / "a.jsonl", [{"messages": messages}])

    def first_turns(**settings: Any) -> list[str]:
        example = load([spec], **settings)[0][0]
        return [turn.content for turn in getattr(example, "prompt", example).turns]

    with pytest.raises(UserError, match=r"data\.system_role"):
        load([spec], tokenizer=tokenizer)
    assert first_turns(tokenizer=tokenizer, system_role="merge") == ["s\n\nu"]
    assert first_turns(tokenizer=tokenizer, system_role="drop") == ["u"]
    assert first_turns() == ["s", "u"]  # the template is not known yet


def test_labelled_text_as_everything(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"{word} film of the year", "label": label} for word, label in [("a", 1), ("the", 0), ("no", 0)]]
    spec = source(tmp_path / "reviews.jsonl", rows)
    prompts, _ = load_prompts([spec], tokenizer=tokenizer, prompt_tokens=4)
    for prompt, row in zip(prompts, rows, strict=True):
        assert str(row["text"]).startswith(prompt.text)
        assert len(render_prompt(tokenizer, prompt)) == 5  # BOS and four tokens
    assert [example.completion for example in load_demonstrations([spec])[0]] == [row["text"] for row in rows]
    pair = load_preferences([spec], seed=1, epoch=2, tokenizer=tokenizer)[0][0]
    assert pair.chosen == "a film of the year"
    assert list(training_texts([spec])) == [row["text"] for row in rows]


def test_the_quickstart_loads() -> None:
    def spec(name: str, split: str = "train") -> SourceSpec:
        return SourceSpec(path=f"rlhf.data.quickstart:{name}", split=split, max_rows=50)

    assert len(load_prompts([spec("preferences")])[0]) == 50
    assert len(load_prompts([spec("heldout_prompts")])[0]) == 50
    assert len(load_demonstrations([spec("demonstrations")])[0]) == 50
    assert len(load_preferences([spec("preferences", "test")])[0]) == 50
