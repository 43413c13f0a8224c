"""No data file ends in a traceback: one line that says what to do, or a counted drop with its place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.load import SourceSpec, load_demonstrations, load_preferences, load_prompts
from rlhf.errors import ExitCode, UserError
from rlhf.models.scratch import train_tokenizer
from tests.data.corpus import CORPUS, Broken
from tests.recipe.corpus import recipe

_ADVICE = re.compile(r"; (a|convert|copy|correct|download|fetch|let|look|rename|separate|take|unpack) ")
LOADERS: dict[str, Any] = {
    "prompts": load_prompts,
    "demonstrations": load_demonstrations,
    "preferences": load_preferences,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["what is it", "it is blue"] * 4, 300)


def load(case: Broken, folder: Path, tokenizer: Any) -> tuple[list[Any], Any]:
    file = folder / case.name
    file.write_bytes(case.content)
    source = SourceSpec(path=str(file), format=case.format)
    found: tuple[list[Any], Any] = LOADERS[case.load]([source], tokenizer=tokenizer, max_prompt_tokens=64)
    return found


@pytest.mark.parametrize("case", [case for case in CORPUS if case.error], ids=lambda case: case.id)
def test_one_line_says_what_is_wrong(case: Broken, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=case.error) as caught:
        load(case, tmp_path, tokenizer)
    message = str(caught.value)
    assert caught.value.code == ExitCode.USER
    assert "\n" not in message and len(message) < 1200
    assert "data." in message or _ADVICE.search(message)


@pytest.mark.parametrize("case", [case for case in CORPUS if case.drops], ids=lambda case: case.id)
def test_bad_rows_are_counted_and_the_rest_is_used(case: Broken, tmp_path: Path, tokenizer: Any) -> None:
    examples, report = load(case, tmp_path, tokenizer)
    (source,) = report.sources
    assert len(examples) == case.used
    assert dict(source.dropped.counts) == case.drops
    assert all(str(tmp_path / case.name) in place for place in source.dropped.examples.values())
    assert all(len(line) < 600 for line in report.lines())


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CORPUS) == len({case.id for case in CORPUS}) > 60


@pytest.mark.parametrize(
    ("objective", "name", "content", "message"),
    [
        ("sft", "rows.jsonl", b'{"prompt": "a"}\n', "have no replies to imitate, which sft"),
        ("sft", "rows.jsonl.gz", b'{"messages": []}\n', "is no gzip file"),
        ("reward", "rows.csv", b"prompt,chosen,chosen\na,b,c\n", "names column 'chosen' more than once"),
        ("reward", "rows.parquet", b"PAR1 and no more", "cannot be read as parquet"),
    ],
)
def test_the_command_ends_with_one_line(
    objective: str, name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    text = recipe(
        objective=f"objective: {objective}", policy="policy: {scratch: {}}", data=f"data: {{train: [{{path: {name}}}]}}"
    )
    (tmp_path / "r.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "train", "r.yaml", "tracking.to=[]"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
