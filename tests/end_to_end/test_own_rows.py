"""A file of one's own in every format that is detected: three steps of each objective that its rows allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.data.formats import TABLE
from rlhf.data.formats.format import Use
from rlhf.errors import ExitCode
from rlhf.objectives import presets

NEEDS: dict[str, Use] = {
    "sft": "demonstrations",
    "reward": "preferences",
    "dpo": "preferences",
    "reinforce": "prompts",  # and every other objective of its loop: rows are the same to all of them
}
RECIPE = """
objective: sft
run: {name: own, seed: 1, steps: 3}
policy: {path: "START", compute_dtype: float32}
reward: {functions: [{call: "tests.end_to_end.test_own_rows:short"}], missing_eos_score: null}
data:
  train: [{path: rows.jsonl}]
  prompt_tokens: 3
rollout: {samples_per_prompt: 2, max_new_tokens: 4}
optim: {lr: 1.0e-2}
batch: {prompts_per_step: 2, microbatch_tokens: 512}
checkpoint: {every_steps: null}
tracking: {to: [], samples: 0}
"""
COLOURS = ("red", "green", "blue", "grey")


def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def turns(colour: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Name {colour}."}, {"role": "assistant", "content": reply}]


def rows(format_name: str) -> list[dict[str, Any]]:
    """Two rows for each colour, as people keep them; HelpSteer's two replies to a prompt are rated differently."""
    return [row(format_name, colour, good) for colour in COLOURS for good in (True, False)]


def row(format_name: str, colour: str, good: bool) -> dict[str, Any]:
    asked, reply = f"Name {colour}.", f"It is {colour}." if good else "No, never."
    both = {"chosen": f"It is {colour}.", "rejected": "No, never."}
    rated = [
        {"response": text, "annotations": {}, "overall_score": score}
        for text, score in zip(both.values(), (9, 2), strict=True)
    ]
    found: dict[str, dict[str, Any]] = {
        "hh_rlhf": {side: f"\n\nHuman: {asked}\n\nAssistant: {text}" for side, text in both.items()},
        "preference": {"prompt": asked, **both},
        "summaries": {
            "info": {"post": f"I like {colour} cakes.", "title": "Cake", "subreddit": "food"},
            "summaries": [{"text": " " + text} for text in both.values()],
            "choice": 0,
        },
        "ultrafeedback": {"instruction": asked, "completions": rated},
        "messages": {"messages": turns(colour, reply)},
        "sharegpt": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": reply}]},
        "helpsteer": {
            "prompt": asked,
            "response": reply,
            **dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 4 if good else 1),
        },
        "completion": {"prompt": asked, "completion": " " + reply},
        "alpaca": {"instruction": "Name it.", "input": colour, "output": reply},
        "gsm8k": {"question": f"{colour}: 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        "prompt": {"prompt": asked},
        "text": {"text": f"a {colour} film , and {'lovely' if good else 'awful'} to the end .", "label": int(good)},
    }
    return found[format_name]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``final/`` of one SFT step."""
    folder = tmp_path_factory.mktemp("start")
    scratch = (
        "{scratch: {family: gemma, layers: 1, hidden_size: 32, heads: 2, vocab_size: 512}, compute_dtype: float32}"
    )
    text = RECIPE.replace('{path: "START", compute_dtype: float32}', scratch).replace("steps: 3", "steps: 1")
    (folder / "recipe.yaml").write_text(text.replace("rows.jsonl", f"{folder}/rows.jsonl"), encoding="utf-8")
    write(folder, "messages")
    assert rlhf.train(str(folder / "recipe.yaml"), f"run.output_dir={folder}/run") == ExitCode.DONE
    return folder / "run" / "final"


def write(folder: Path, format_name: str) -> None:
    lines = [json.dumps(found) for found in rows(format_name)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("objective", NEEDS)
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_rows_of_a_format_train_what_they_allow(
    entry: Any,
    objective: str,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, entry.name)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("START", str(start)), encoding="utf-8")
    code = rlhf.train("recipe.yaml", f"objective={objective}")
    if not entry.serves(NEEDS[objective]):
        assert code == ExitCode.USER
        assert "formats that have it" in capsys.readouterr().err
        return
    assert code == ExitCode.DONE
    told = json.loads((tmp_path / "runs" / f"own-{objective}" / "run.json").read_text())
    assert (told["status"], told["step"]) == ("finished", 3)


def test_every_loop_is_among_them() -> None:
    """An objective that reads rows in another way is tried on every format too."""
    assert {presets.preset(name).program for name in NEEDS} == {entry.program for entry in presets.OBJECTIVES.values()}
