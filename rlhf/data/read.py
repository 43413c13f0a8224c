"""Raw rows from a file, a folder, the hub, or a function; nothing here knows what the columns mean."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.dropped import Dropped
from rlhf.errors import UserError
from rlhf.locate import named_code

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".json")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def read_rows(
    path: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    *,
    seed: int = 0,
    dropped: Dropped | None = None,
) -> list[Row]:
    """The rows of ``read_placed_rows``, without their places."""
    return [row for _, row in read_placed_rows(path, split, columns, max_rows, seed=seed, dropped=dropped)]


def read_placed_rows(
    path: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    *,
    seed: int = 0,
    dropped: Dropped | None = None,
) -> list[tuple[str, Row]]:
    """(place, row) of the first ``max_rows`` readable rows, with ``columns`` (ours → theirs) renamed. A place is
    ``train.jsonl:17`` or ``row 17``.

    ``path`` is a local .jsonl or .json file (``split`` is not read), a folder with ``<split>.jsonl`` or
    ``<split>.json`` or anything else ``datasets`` loads, ``package.module:function`` (called with ``seed`` and
    ``split`` if it takes them; it returns rows), or a hub id. Lines that are not JSON objects, and rows with NaN or
    Infinity, are counted in ``dropped`` with file and line, never passed on. Raises UserError for what cannot be read
    at all and for a column that no row has.
    """
    dropped = Dropped() if dropped is None else dropped
    source = Path(path).expanduser()
    if _FUNCTION.fullmatch(path) and not source.exists():
        rows = _objects(enumerate(_call(path, split, seed)), "row ", dropped)
    elif source.is_file() or source.suffix in SUFFIXES:
        rows = _file_rows(source, dropped)
    elif source.is_dir():
        rows = _folder_rows(source, split, dropped)
    elif _looks_local(path):
        raise UserError(
            f"{path} does not exist; set data.*.path to a file, a folder, a hub id or package.module:function"
        )
    else:
        rows = _objects(enumerate(_hub_rows(path, split)), "row ", dropped)
    placed = list(islice(rows, max_rows))
    renamed = _renamed([row for _, row in placed], columns or {}, path)
    return [(place, row) for (place, _), row in zip(placed, renamed, strict=True)]


def _file_rows(source: Path, dropped: Dropped) -> Iterator[tuple[str, Row]]:
    if source.suffix not in SUFFIXES:
        raise UserError(f"{source}: files end in .jsonl or .json here; convert it, one JSON object per line")
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}; check data.*.path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    if source.suffix == ".json" and text.lstrip().startswith("["):
        yield from _objects(enumerate(_whole_file(source, text)), f"{source}, element ", dropped)
    else:
        # split("\n"), not splitlines(): U+2028 may stand unescaped inside a JSON string.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        yield from _objects(((number, _parsed(line)) for number, line in lines), f"{source}:", dropped)


def _whole_file(source: Path, text: str) -> list[Any]:
    try:
        return list(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno}: not valid JSON ({error.msg}); correct that line") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return error


def _objects(numbered: Iterable[tuple[int, Any]], place: str, dropped: Dropped) -> Iterator[tuple[str, Row]]:
    """The numbered values that are finite JSON objects; the others are counted at ``place`` + number."""
    for number, value in numbered:
        if isinstance(value, Exception):
            dropped.add("not valid JSON", f"{place}{number}: {value}")
        elif not isinstance(value, Mapping):
            dropped.add("not an object with named columns", f"{place}{number}: {type(value).__name__}")
        elif not _finite(value):
            dropped.add("NaN or Infinity in the row", f"{place}{number}")
        else:
            yield f"{place}{number}", dict(value)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return value - value == 0.0
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple) else True


def _folder_rows(folder: Path, split: str, dropped: Dropped) -> Iterator[tuple[str, Row]]:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return _file_rows(folder / f"{split}{suffix}", dropped)
    return _objects(enumerate(_hub_rows(str(folder), split)), f"{folder}, row ", dropped)


def _hub_rows(path: str, split: str) -> Iterable[Any]:
    import datasets

    try:
        loaded: Iterable[Any] = datasets.load_dataset(path, split=split)
    except Exception as error:  # the library raises a dozen unrelated kinds; all of them mean this one thing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data set {path!r} (split {split!r}) cannot be loaded: {reason}; "
            "check data.*.path and data.*.split, or name a local .jsonl file"
        ) from error
    return loaded


def _call(path: str, split: str, seed: int) -> Iterable[Any]:
    function = named_code(path, "data.*.path")
    accepted = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    given = {"seed": seed, "split": split}
    rows = function(**{name: value for name, value in given.items() if takes_any or name in accepted})
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise UserError(f"{path} returned {type(rows).__name__}; a data function returns a list of rows (dicts)")
    return rows


def _looks_local(path: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``; everything else was meant as a place on this machine."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path


def _renamed(rows: list[Row], columns: Mapping[str, str], path: str) -> list[Row]:
    present = {key for row in rows for key in row}
    for theirs in columns.values():
        if rows and theirs not in present:
            raise UserError(
                f"{path} has no column {theirs!r}{_did_you_mean(theirs, sorted(present))}; its columns are "
                f"{sorted(present)}: correct data.*.columns"
            )
    taken = set(columns.values())
    # A renamed column wins over one that already has the name.
    return [
        {key: value for key, value in row.items() if key not in taken}
        | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        for row in rows
    ]


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
