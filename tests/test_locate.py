"""Code named in a recipe: found from the working folder too, and refused in one line that says which part is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.locate import named_code

MODULE = "def short(completions, **kwargs):\n    return [0.0]\n\nLIMIT = 3\n"


def test_code_is_found_by_name_also_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert named_code("my_own_code:short", "reward function")(completions=[""]) == [0.0]
    with pytest.raises(UserError, match=r"my_own_code has no 'shrot'; did you mean 'short'\?"):
        named_code("my_own_code:shrot", "reward function")
    with pytest.raises(UserError, match=r"is 3 \(int\), which cannot be called"):
        named_code("my_own_code:LIMIT", "reward function")


def test_rows_made_by_code_of_the_working_folder_reach_the_installed_command(tmp_path: Path) -> None:
    """The console script's sys.path starts with its own folder, not with the working folder."""
    (tmp_path / "my_own_rows.py").write_text("def rows():\n    return [{'text': 'a'}]\n")
    script = (
        "import sys; sys.path[:] = [p for p in sys.path if p not in ('', '.')]\n"
        "from rlhf.data.read import read_rows; print(read_rows('my_own_rows:rows'))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[{'text': 'a'}]", done.stderr


@pytest.mark.parametrize("call", ["", "module", "module:", ":function", "module.function"])
def test_names_of_another_form_are_refused(call: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form package\.module:function"):
        named_code(call, "objective")


def test_a_missing_module_says_so_in_one_line() -> None:
    with pytest.raises(UserError, match=r"module no_such_module_here cannot be imported \(No module named") as info:
        named_code("no_such_module_here:function", "objective")
    assert "\n" not in str(info.value)
