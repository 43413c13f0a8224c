"""``rlhf plan`` on the command line: tables, JSON, exit codes, and what it says of models it cannot see."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.errors import UserError
from rlhf.locate import shipped_recipes
from rlhf.models.scratch import build_config
from rlhf.planning.sizes import parse_bytes, shown

RECIPE = """
objective: reinforce
run: {{name: x}}
policy: {{path: {policy}}}
reward: {{functions: [{{call: "rlhf.rewards.verifiable:math_answer"}}]}}
data: {{train: [{{path: someone/rows}}], max_prompt_tokens: 32}}
rollout: {{max_new_tokens: 32}}
batch: {{prompts_per_step: 8}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write(place: Path, policy: str) -> str:
    (place / "r.yaml").write_text(RECIPE.format(policy=policy))
    return "r.yaml"


def plan(*words: str) -> tuple[str, int]:
    """What is printed, and the exit code; a UserError leaves as ``main`` of the command line makes it."""
    found = CliRunner().invoke(app, ["plan", *words])
    if isinstance(found.exception, UserError):
        return found.output + str(found.exception), int(found.exception.code)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.output, found.exit_code


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_fits_where_its_header_says_it_runs(name: str, place: Path) -> None:
    """With no network, no weights, and none of the runs that it starts from."""
    header = shipped_recipes()[name].read_text(encoding="utf-8")
    gpus = re.search(r"(one|8) GPUs? of (\d+) GB", header)
    machine = ["--gpus", gpus[1].replace("one", "1"), "--gpu-memory", f"{gpus[2]}GB"] if gpus else []
    assert gpus or "CPU cores" in header
    said, code = plan(name, *machine)
    assert code == 0, said
    assert "fits: " in said and "room for: batch.microbatch_tokens=" in said


def test_a_plan_says_whose_numbers_it_took(place: Path) -> None:
    build_config("gemma", layers=2, hidden_size=64, heads=4, vocab_size=300).save_pretrained(place / "mine")
    said, code = plan(write(place, "./mine"))
    assert code == 0 and "./mine: 0.142 million weights, 2 layers" in said and "(config.json)" in said
    said, code = plan(write(place, "google/gemma-2b-it"), "--gpus", "1", "--gpu", "h200")
    assert code == 0 and "table of public models; its own config.json was not at hand" in said
    said, code = plan("quickstart/reinforce")
    assert "what recipes/quickstart/sft.yaml makes" in said or "quickstart/sft makes" in said


def test_a_folder_wins_over_the_table(place: Path) -> None:
    config = build_config("gemma", layers=2, hidden_size=64, heads=4, vocab_size=300)
    config.save_pretrained(place / "google" / "gemma-2b")
    said, _ = plan(write(place, "google/gemma-2b"))
    assert "2 layers" in said and "config.json" in said


def test_what_does_not_fit_is_said_in_one_line_after_the_table(place: Path) -> None:
    said, code = plan(write(place, "google/gemma-7b"), "--gpus", "1", "--gpu-memory", "40GiB")
    assert code == 2
    assert said.splitlines()[-1].startswith("does not fit: ")
    assert "smallest change: " in said and "optimizer step" in said


def test_json_holds_what_the_tables_show(place: Path) -> None:
    said, code = plan(
        write(place, "google/gemma-2b"), "--gpus", "8", "--gpu", "h100", "--accelerate", "zero3", "--json"
    )
    found = json.loads(said)
    assert code == 0 and found["fits"] and found["placement"] == {"kind": "zero3", "processes": 8}
    assert found["models"]["google/gemma-2b"]["parameters"] == 2_506_172_416
    peaks = {phase["name"]: phase["peak_bytes"] for phase in found["phases"]}
    assert max(peaks.values()) == found["peak"]["bytes"] and set(found["seconds"]) <= set(peaks)


@pytest.mark.parametrize(
    ("policy", "words", "said"),
    [
        ("someone/else", [], "policy.path=someone/else: its configuration is not on this machine"),
        ("runs/nobody-sft/final", [], "no recipe is known whose run makes it"),
        ("google/gemma-2b", ["--gpus", "2"], "how much memory has a GPU"),
        ("google/gemma-2b", ["--gpus", "2", "--gpu", "abacus"], "no figures of a GPU called 'abacus'"),
        ("google/gemma-2b", ["--gpus", "2", "--gpu-memory", "much"], "'much' is no amount of memory"),
        ("google/gemma-2b", ["--gpus", "3", "--gpu", "h100"], "does not divide over 3 processes"),
    ],
)
def test_what_says_too_little_is_refused(policy: str, words: list[str], said: str, place: Path) -> None:
    output, code = plan(write(place, policy), *words)
    assert code == 2 and said in output


def test_amounts_of_memory() -> None:
    assert [parse_bytes(text) for text in ("80GiB", "80GB", "1.5 g", "512")] == [
        80 * 2**30,
        80 * 10**9,
        15 * 10**8,
        512,
    ]
    assert [shown(size) for size in (512, 1536, 27.4 * 2**30, 103 * 2**30)] == [
        "512 B",
        "1.50 KiB",
        "27.4 GiB",
        "103 GiB",
    ]
    with pytest.raises(UserError):
        parse_bytes("0GiB")


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("gemma/")])
def test_headers_hold_what_the_plan_says(name: str, place: Path) -> None:
    header = shipped_recipes()[name].read_text(encoding="utf-8")
    gpus, config = re.search(r"(one|8) GPUs? of (\d+) GB", header), re.search(r"--accelerate (\w+)", header)
    told = re.search(r"# Plan: +(\d+) of (\d+) GiB a GPU at the peak \((.+)\), about (\d+) s a step on (\w+)s", header)
    assert gpus and config and told
    machine = ["--gpus", gpus[1].replace("one", "1"), "--gpu-memory", f"{gpus[2]}GB", "--gpu", told[5].lower()]
    found = json.loads(plan(name, *machine, "--accelerate", config[1], "--json")[0])
    seconds = sum(found["seconds"].values())
    figures = [f"{size / 2**30:.0f}" for size in (found["peak"]["bytes"], found["usable_bytes"])]
    assert list(told.groups()[:4]) == [*figures, found["peak"]["phase"], f"{seconds:.0f}"]
