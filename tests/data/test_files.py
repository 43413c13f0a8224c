"""Every kind of file, compressed and in folders, gives the same rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.dropped import Dropped
from rlhf.data.kinds import SUFFIXES, kind_of, suffix_of
from rlhf.data.read import read_placed_rows, read_rows
from rlhf.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'one, "two"', "completion": "a\nb"},
    {"prompt": "drei ü \u2028", "completion": ""},
]


def content(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    return table(kind, rows)


def table(kind: str, rows: list[dict[str, Any]], stream: bool = False) -> bytes:
    import pyarrow
    from pyarrow import ipc, parquet

    data, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(data, sink)
        return sink.getvalue()
    with (ipc.new_stream if stream else ipc.new_file)(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


def written(path: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    raw = content(kind, rows)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    kind = kind_of(f"x{suffix}")
    assert kind is not None
    file = written(tmp_path / f"train{suffix}", kind)
    assert read_rows(str(file)) == ROWS
    assert read_rows(str(tmp_path), "train") == ROWS
    assert read_rows(str(file), max_rows=1) == ROWS[:1]


def test_places_are_lines_where_a_kind_has_lines(tmp_path: Path) -> None:
    places = {
        kind: [place for place, _ in read_placed_rows(str(written(tmp_path / f"a.{kind}", kind)))]
        for kind in ("jsonl", "json", "csv", "parquet", "arrow")
    }
    name = f"{tmp_path}/a"
    assert places["jsonl"] == [f"{name}.jsonl:1", f"{name}.jsonl:2"]
    assert places["csv"] == [f"{name}.csv:2", f"{name}.csv:4"]  # the first row spans two lines
    assert places["json"] == [f"{name}.json, element 0", f"{name}.json, element 1"]
    assert places["parquet"] == [f"{name}.parquet, row 0", f"{name}.parquet, row 1"]


def test_nested_columns_survive_a_table(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "score": 1.5}]
    assert read_rows(str(written(tmp_path / "a.parquet", "parquet", rows))) == rows


def test_an_arrow_stream_and_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.arrow").write_bytes(table("arrow", ROWS, stream=True))
    assert read_rows(str(tmp_path / "a.arrow")) == ROWS
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "dict"))
    assert read_rows(str(tmp_path / "one")) == ROWS
    assert read_rows(str(tmp_path / "dict"), "test") == ROWS
    with pytest.raises(UserError, match="cannot be loaded"):
        read_rows(str(tmp_path / "dict"), "train")


def test_a_folder_with_two_kinds_of_a_split_is_not_guessed_at(tmp_path: Path) -> None:
    for kind in ("jsonl", "csv"):
        written(tmp_path / f"train.{kind}", kind)
    with pytest.raises(UserError, match=r"holds train\.jsonl, train\.csv.*set data\.\*\.path"):
        read_rows(str(tmp_path))


def test_spreadsheets_as_they_are_exported(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, a data frame's unnamed index, an empty line."""
    file = tmp_path / "a.CSV"
    file.write_bytes("\ufeff,prompt,score\r\n0,hällo,1.5\r\n\r\n1,you,2\r\n".encode())
    assert read_rows(str(file)) == [{"prompt": "hällo", "score": "1.5"}, {"prompt": "you", "score": "2"}]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert read_rows(str(lines)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_cells_longer_than_the_librarys_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    file = written(tmp_path / "a.csv", "csv", [{"prompt": "x" * (limit + 1)}])
    assert len(read_rows(str(file))[0]["prompt"]) == limit + 1
    assert csv.field_size_limit() == limit  # it is global, and other people's


def test_what_a_row_may_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    bad = [r'"\u0000"', r'"\ud83d"', "NaN", '{"\\u0000": 1}', "9" * 5000, "[" * 5000 + "]" * 5000, '{"a": 1, "a": 2}']
    file.write_text("\n".join(f'{{"x": {value}}}' for value in (*bad, r'"\ud83d\ude00"')))
    dropped = Dropped()
    assert read_rows(str(file), dropped=dropped) == [{"x": "\U0001f600"}]
    assert dropped.total == len(bad)
    assert set(dropped.counts) <= {
        "a NUL character in the row",
        "half of a surrogate pair in the row",
        "NaN or Infinity in the row",
        "not valid JSON",
        "nested too deeply",
        "a key comes twice in one object",
    }
    assert dropped.examples["a key comes twice in one object"] == f"{file}:7: 'a'"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSON.GZ", ".json.gz"),
        ("b/c.tsv", ".tsv"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.txt", None),
    ],
)
def test_suffixes(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix
