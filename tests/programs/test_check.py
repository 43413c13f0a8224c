"""What ``rlhf check`` says about data: counts, tokens, lengths; and what it cannot look at."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.models.scratch import train_tokenizer
from rlhf.programs import hub
from rlhf.programs.check import describe_data
from rlhf.programs.check_show import quantiles
from rlhf.recipe import load_recipe

CHAT = [
    {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]},
    {"messages": [{"role": "user", "content": "Hi " * 40}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": "Bye\x1b[31m"}, {"role": "assistant", "content": "Bye"}]},
]
PAIRS = [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "No"}]
Check = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: check loads none."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["Hi there Hello Bye No"], 300).save_pretrained(folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    return folder


@pytest.fixture
def check(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Checks a recipe of these rows; returns the lines."""
    monkeypatch.chdir(tmp_path)
    work_offline = hub.work_offline
    monkeypatch.setattr(hub, "work_offline", lambda: restored(monkeypatch, work_offline))

    def run(objective: str, rows: list[dict[str, Any]], *overrides: str, limit: int = 100) -> list[str]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("r.yaml").write_text(
            f"objective: {objective}\nrun: {{name: x, steps: 1}}\npolicy: {{path: {model}}}\n"
            'reward: {functions: [{call: "rlhf.data.quickstart:gold"}]}\n'
            "data: {train: [{path: rows.jsonl}], max_prompt_tokens: 60}\nrollout: {max_new_tokens: 7}\n"
        )
        ready = load_recipe("r.yaml", overrides)
        capsys.readouterr()
        describe_data(ready, limit)
        return capsys.readouterr().out.splitlines()

    return run


def labelled(lines: list[str], label: str) -> list[str]:
    """The lines under a label, without it."""
    found, here = [], ""
    for line in lines:
        here = line[:11].strip() or here
        if here == label:
            found.append(line[11:])
    return found


def test_demonstrations_are_counted_and_shown_with_their_loss_mask(check: Check) -> None:
    lines = check("sft", CHAT)
    assert labelled(lines, "rows") == [
        "data.train.0 rows.jsonl: 2 of 4 rows used as messages",
        "  dropped: messages: an empty turn: 1 (first: rows.jsonl:2)",
        "  dropped: prompt longer than 60 tokens: 1 (first: rows.jsonl:3)",
    ]
    _, shown = labelled(lines, "example")
    prompt, _, completion = shown.partition("[")
    assert prompt.startswith("<bos>|<start_of_turn>|") and prompt.endswith("|\\n")
    assert prompt.replace("|", "") == "<bos><start_of_turn>user\\nHi there<end_of_turn>\\n<start_of_turn>model\\n"
    assert re.sub(r"\]\[", "", f"[{completion}") == "[Hello<end_of_turn>]"
    assert labelled(lines, "bos") == ["1 in the first example"]
    assert "a completion ends at <eos> (1), <end_of_turn> (5)" in labelled(lines, "special")


def test_tokens_that_do_not_count_are_outside_the_brackets(check: Check) -> None:
    _, shown = labelled(check("sft", CHAT, "sft.completion_only=false"), "example")
    assert shown.startswith("<bos>[<start_of_turn>][") and "|" not in shown  # all but the first token count


def test_lengths_are_those_of_rows(check: Check) -> None:
    prompts, completions = labelled(check("sft", CHAT[:1]), "lengths")
    _, shown = labelled(check("sft", CHAT[:1]), "example")
    prompt = shown.partition("[")[0].count("|") + 1
    assert prompts == f"data.train prompts     p50 {prompt}  p90 {prompt}  p99 {prompt}  max {prompt} tokens"
    assert completions.split()[-2] == str(shown.count("["))


def test_quantiles_by_nearest_rank() -> None:
    assert quantiles(range(1, 11)) == "p50 5  p90 9  p99 10  max 10 tokens"
    assert quantiles([3]) == "p50 3  p90 3  p99 3  max 3 tokens"


def test_prompts_and_pairs(check: Check) -> None:
    prompts = check("reinforce", PAIRS)
    assert "the policy goes on from here" in labelled(prompts, "example")[0]
    assert "[" not in labelled(prompts, "example")[1]
    assert labelled(prompts, "lengths")[-1] == "completions are sampled: up to 7 tokens"
    header, chosen, rejected = labelled(check("reward", PAIRS), "example")
    assert "each scored at its last token" in header
    assert chosen.endswith("[<end_of_turn>]") and rejected.startswith("or: [N") and rejected.endswith("[<end_of_turn>]")


def test_pairs_that_share_prompts_are_counted_as_a_step_takes_them(check: Check) -> None:
    lines = check("reward", [*PAIRS, PAIRS[0] | {"chosen": "Bye"}], "batch.prompts_per_step=8")
    assert "data.train: 2 pairs of 1 prompts; a step takes 8 prompts, all pairs" in labelled(lines, "rows")


def test_no_text_of_a_row_reaches_the_terminal_raw(check: Check) -> None:
    lines = check("sft", [CHAT[3]])
    assert "\x1b" not in "".join(lines) and r"\x1b" in "".join(lines)


def test_a_source_that_was_cut_short_says_so(check: Check) -> None:
    assert labelled(check("sft", CHAT[:1] * 5, limit=3), "rows") == [
        "data.train.0 rows.jsonl: 3 of 3 rows used as messages (the first 3; --rows looks at more)"
    ]
    ends = check("sft", CHAT[:1] * 5, "data.train.0.max_rows=3", limit=3)
    assert labelled(ends, "rows") == ["data.train.0 rows.jsonl: 3 of 3 rows used as messages"]


def test_without_a_chat_template_rows_are_still_counted(
    check: Check, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(["Hi there"], 300)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"max_position_embeddings": 2048}')
    system = {"messages": [{"role": "system", "content": "Be kind"}, *CHAT[0]["messages"]]}
    for rows in (CHAT, [system]):
        with pytest.raises(UserError, match=r"^data\.train\.0: .*has no chat template.*set policy\.chat_template"):
            check("sft", rows, f"policy.path={tmp_path / 'base'}")
        told = capsys.readouterr().out.splitlines()
        assert labelled(told, "rows")[0].startswith("data.train.0 rows.jsonl: ")
        assert labelled(told, "example")[0].endswith("user: Hi there [Hello]")


def test_a_broken_tokenizer_is_an_error_after_what_can_be_shown(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "gemma", "max_position_embeddings": 2048}')
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^tokens and lengths not shown: policy\.path=.*no tokenizer could be loaded"):
        check("sft", CHAT, f"policy.path={tmp_path / 'broken'}")
    assert labelled(capsys.readouterr().out.splitlines(), "example") == ["user: Hi there [Hello]"]


def test_rows_that_cannot_be_trained_on_are_an_error(check: Check) -> None:
    with pytest.raises(
        UserError, match=r"^data\.train\.0: rows\.jsonl: rows of format prompt \(prompt\) have no replies to imitate"
    ):
        check("sft", [{"prompt": "a"}])


def test_text_is_counted_also_where_prompts_are_to_be_cut_from_it(check: Check, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub, "_silence", lambda endpoint: "no network")
    lines = check("reinforce", [{"text": "a b c"}], "data.prompt_tokens=2", "policy.path=acme/small-it")
    assert labelled(lines, "rows") == ["data.train.0 rows.jsonl: 1 of 1 rows used as text"]


def test_a_hub_out_of_reach_is_a_warning_and_is_not_asked_again(check: Check, monkeypatch: Any) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    slept = list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    lines = check("sft", CHAT, "policy.path=acme/small-it", "data.train.1={path: acme/rows}")
    assert not slept  # the libraries wait between their retries
    about_the_hub, no_tokenizer = labelled(lines, "warning")[:2]
    assert about_the_hub.startswith("http://127.0.0.1:9 does not answer: ")
    assert no_tokenizer.startswith("tokens and lengths not shown: policy.path=acme/small-it: ")
    assert any(line.startswith("data.train.1: data set 'acme/rows'") for line in labelled(lines, "warning"))
    assert labelled(lines, "rows")[0] == "data.train.0 rows.jsonl: 3 of 4 rows used as messages"
    assert labelled(lines, "example") == ["user: Hi there [Hello]"]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_is_given_up_on(silent_server: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.2)
    started = time.monotonic()
    assert hub._silence(silent_server) is not None
    assert time.monotonic() - started < 5


def test_the_hub_is_asked_only_where_it_is_needed(monkeypatch: Any) -> None:
    def asked(endpoint: str) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(hub, "_silence", asked)
    assert hub.offline_reason(["./rows.jsonl", "package.module:function"]) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.offline_reason(["acme/rows"]) == "HF_HUB_OFFLINE is set"


def restored(monkeypatch: pytest.MonkeyPatch, work_offline: Callable[[], None]) -> None:
    """Works offline until the end of this test: the process has other tests to run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], "HF_HUB_OFFLINE", False)
    work_offline()
