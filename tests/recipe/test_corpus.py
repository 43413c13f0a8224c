"""Every broken recipe is refused with one clear block of lines; no valid one is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import ExitCode, UserError
from rlhf.recipe import load_recipe
from tests.recipe.conftest import model_folder
from tests.recipe.corpus import CORPUS, MEANING, STRUCTURE, TOKEN, TYPES, VALID

# One of each kind goes through the real command line too.
THROUGH_THE_COMMAND = [*list(TYPES)[::5], *list(STRUCTURE)[::5], *list(MEANING)[::8]]


def write(folder: Path, text: str | bytes) -> Path:
    (folder / "repo" / ".git").mkdir(parents=True)
    model_folder(folder / "other" / "final")
    file = folder / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 60 and len(VALID) >= 20 and len(THROUGH_THE_COMMAND) >= 20


@pytest.mark.parametrize("name", CORPUS)
def test_broken(name: str, place: Path) -> None:
    case = CORPUS[name]
    write(place, case.text)
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    message, code = str(caught.value), caught.value.code
    assert code == ExitCode.USER
    assert_one_block(message)
    for words in case.says:
        assert words in message
    if case.line:
        assert f"r.yaml:{case.line}: " in message


def assert_one_block(message: str) -> None:
    """Lines of `file:line: key: what`, none empty, none endless, none with a secret or a control character."""
    lines = message.split("\n")
    assert 1 <= len(lines) <= 8
    for line in lines:
        assert re.match(r"r\.yaml(:\d+)?: \S", line), line
        assert len(line) < 400
        assert line.isprintable()
    assert TOKEN not in message and "secret@" not in message and "0a0a0a0a" not in message
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str, place: Path) -> None:
    write(place, VALID[name])
    recipe = load_recipe("r.yaml")
    assert recipe.run.name
    (place / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe("again.yaml") == recipe


_NO_HEAVY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "accelerate", "datasets", "numpy"):
            raise AssertionError(name + " was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["rlhf", "check", "r.yaml"]
from runpy import run_module
run_module("rlhf", run_name="__main__")
"""


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_broken_through_the_command(name: str, place: Path) -> None:
    """`rlhf check`: exit code 2, the block on stderr, no traceback, and torch is never asked for."""
    write(place, CORPUS[name].text)
    done = subprocess.run([sys.executable, "-c", _NO_HEAVY], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert_one_block(done.stderr.rstrip("\n"))
