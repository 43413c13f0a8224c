from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.dropped import Dropped
from rlhf.data.read import read_placed_rows, read_rows
from rlhf.errors import UserError


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_bad_lines_are_counted_with_their_line_number(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        '{"text": "one"}',
        "{broken",
        "",
        '["no", "columns"]',
        '{"text": "two", "score": NaN}',
        '{"text": "three", "inner": {"list": [1e999]}}',
        '{"text": "four"}',
    )
    dropped = Dropped()
    rows = read_placed_rows(file, dropped=dropped)
    assert rows == [(f"{file}:1", {"text": "one"}), (f"{file}:7", {"text": "four"})]
    assert dropped.total == 4
    assert dropped.counts["NaN or Infinity in the row"] == 2
    assert dropped.examples["NaN or Infinity in the row"] == f"{file}:5"
    assert dropped.examples["not valid JSON"].startswith(f"{file}:2: ")
    assert dropped.examples["not an object with named columns"] == f"{file}:4: list"


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert read_rows(file) == [{"text": "a\u2028b\x85c"}]


def test_json_may_be_one_list_or_one_object_per_line(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.json", '[{"text": "x"},', '{"text": "y"}]')) == [{"text": "x"}, {"text": "y"}]
    assert read_rows(write(tmp_path / "b.json", '{"text": "x"}', '{"text": "y"}')) == [{"text": "x"}, {"text": "y"}]
    with pytest.raises(UserError, match=r"c\.json:2: not valid JSON"):
        read_rows(write(tmp_path / "c.json", '[{"text": "x"},', "oops]"))


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "x"}')
    write(tmp_path / "test.json", '[{"text": "y"}]')
    assert read_rows(str(tmp_path), "test") == [{"text": "y"}]
    assert read_rows(str(tmp_path)) == [{"text": "x"}]


def test_max_rows_counts_usable_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "oops", '{"text": "x"}', '{"text": "y"}', '{"text": "z"}')
    assert read_rows(file, max_rows=2) == [{"text": "x"}, {"text": "y"}]


def test_columns_are_renamed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"question": "q", "prompt": "old", "answer": "a"}')
    assert read_rows(file, columns={"prompt": "question"}) == [{"prompt": "q", "answer": "a"}]
    assert read_rows(file, columns={"prompt": "answer", "completion": "answer"}) == [
        {"question": "q", "prompt": "a", "completion": "a"}
    ]
    assert read_rows(file, columns={"prompt": "question", "question": "prompt"}) == [
        {"question": "old", "prompt": "q", "answer": "a"}
    ]
    with pytest.raises(UserError, match=r"no column 'questoin' \(did you mean 'question'\?\)"):
        read_rows(file, columns={"prompt": "questoin"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"x,y", "files end in .jsonl, .json"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
        ("absent.jsonl", None, "cannot be read"),
        ("absent/folder", None, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_the_users_to_fix(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def rows_by_code(seed: int, split: str) -> list[dict[str, Any]]:
    return [{"text": f"{split} {seed}"}, {"text": float("nan")}]


def rows_without_arguments() -> list[dict[str, Any]]:
    return [{"text": "fixed"}]


def one_row() -> dict[str, Any]:
    return {"text": "not a list"}


def test_a_function_gets_the_arguments_it_names() -> None:
    dropped = Dropped()
    assert read_rows(f"{__name__}:rows_by_code", "test", seed=3, dropped=dropped) == [{"text": "test 3"}]
    assert dropped.total == 1
    assert read_rows(f"{__name__}:rows_without_arguments") == [{"text": "fixed"}]


def test_functions_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match="did you mean 'rows_by_code'"):
        read_rows(f"{__name__}:row_by_code")
    with pytest.raises(UserError, match="cannot be imported"):
        read_rows("no_such_module_here:rows")
    with pytest.raises(UserError, match="returned dict"):
        read_rows(f"{__name__}:one_row")


def test_a_hub_set_that_cannot_be_loaded_names_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(path: str, name: str | None, split: str) -> None:
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'org/name' \(split 'train'\) cannot be loaded: no route to the hub; check"):
        read_rows("org/name")


def test_a_hub_set_is_read_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": f"{path} {name} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("org/name", "validation") == [{"text": "org/name None validation"}]
    assert read_rows("org/name", subset="main") == [{"text": "org/name main train"}]
