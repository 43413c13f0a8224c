"""Raw rows from a file, a folder, the hub, or a function; nothing here knows what the columns mean."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.data.checked import PlacedRow, Row, checked
from rlhf.data.dropped import Dropped
from rlhf.data.files import file_of_split, file_rows
from rlhf.data.kinds import suffix_of
from rlhf.errors import UserError
from rlhf.locate import named_code

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def read_rows(
    path: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    *,
    subset: str | None = None,
    seed: int = 0,
    dropped: Dropped | None = None,
) -> list[Row]:
    """The rows of ``read_placed_rows``, without their places."""
    return [
        row for _, row in read_placed_rows(path, split, columns, max_rows, subset=subset, seed=seed, dropped=dropped)
    ]


def read_placed_rows(
    path: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    *,
    subset: str | None = None,
    seed: int = 0,
    dropped: Dropped | None = None,
) -> list[PlacedRow]:
    """(place, row) of the first ``max_rows`` readable rows, with ``columns`` (ours → theirs) renamed. A place is
    ``train.jsonl:17`` or ``row 17``.

    ``path`` is a local file of a kind in ``rlhf.data.kinds`` (``split`` is not read), a folder with
    ``<split>.<suffix>``, one that ``datasets`` saved or anything else it loads, ``package.module:function`` (called
    with ``seed`` and ``split`` if it takes them; it returns rows), or a hub id. Lines that are no rows, and rows with
    NaN, NUL and the like, are counted in ``dropped`` with their place, never passed on. Raises UserError for what
    cannot be read at all and for a column that no row has.
    """
    dropped = Dropped() if dropped is None else dropped
    source = Path(path).expanduser()
    if _FUNCTION.fullmatch(path) and not source.exists():
        rows = checked(enumerate(_call(path, split, seed)), "row ", dropped)
    elif source.is_dir():
        rows = _folder_rows(source, split, dropped)
    elif source.is_file() or suffix_of(source):
        rows = file_rows(source, dropped)
    elif _looks_local(path):
        raise UserError(
            f"{path} does not exist; set data.*.path to a file, a folder, a hub id or package.module:function"
        )
    else:
        rows = checked(enumerate(_hub_rows(path, split, subset)), "row ", dropped)
    placed = list(islice(rows, max_rows))
    renamed = _renamed([row for _, row in placed], columns or {}, path)
    return [(place, row) for (place, _), row in zip(placed, renamed, strict=True)]


def _folder_rows(folder: Path, split: str, dropped: Dropped) -> Iterator[PlacedRow]:
    file = file_of_split(folder, split)
    if file is not None:
        return file_rows(file, dropped)
    return checked(enumerate(_hub_rows(str(folder), split, None)), f"{folder}, row ", dropped)


def _hub_rows(path: str, split: str, subset: str | None) -> Iterable[Any]:
    import datasets

    saved = any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))  # by save_to_disk
    try:
        loaded: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, name=subset, split=split)
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[split]
    except Exception as error:  # the library raises a dozen unrelated kinds; all of them mean this one thing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        which = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
        raise UserError(
            f"data set {path!r} ({which}) cannot be loaded: {reason}; "
            "check data.*.path, data.*.subset and data.*.split, or name a local file"
        ) from error
    return loaded  # type: ignore[no-any-return]


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
