"""Rows of tables: CSV and TSV by the standard library, parquet and arrow by pyarrow."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.data.checked import NotARow
from rlhf.errors import UserError

Numbered = Iterator[tuple[int, Any]]
ByteStream = gzip.GzipFile | io.BufferedReader

_ROWS_AT_ONCE = 1024


def delimited(path: Path, stream: ByteStream, kind: str, longest: int) -> Numbered:
    """(line, row) of a CSV or TSV file with a header; a cell may span lines. Every cell is text."""
    line = 1
    # newline="": a cell may hold a line break
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text, _cells_up_to(longest):
        reader = csv.reader(text, delimiter="\t" if kind == "tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header)
            line = reader.line_num + 1
            for cells in reader:
                if cells:  # an empty line
                    yield line, _row(header, cells)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: not valid {kind.upper()} ({error}); look for a quote that is not closed"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (after line {reader.line_num}); convert it to UTF-8") from error


@contextmanager
def _cells_up_to(longest: int) -> Iterator[None]:
    """The library's limit is global and far too low for conversations; it is put back."""
    before = csv.field_size_limit(longest)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(path: Path, header: list[str]) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise UserError(f"{path}: the header names column {twice[0]!r} more than once; rename one of them")
    if len(header) == 1:
        other = next((mark for mark in ";\t,|" if mark in header[0]), None)
        if other:
            raise UserError(
                f"{path}: the header is one column, {header[0]!r:.80}, so the file seems to be separated by {other!r}; "
                "separate it by commas (.csv) or tabs (.tsv)"
            )


def _row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        few = "fewer" if len(cells) < len(header) else "more"
        return NotARow(f"{few} cells than the header has columns", f"{len(cells)} of {len(header)}")
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}  # unnamed: a data frame's index


def table(path: Path, kind: str) -> Iterator[Any]:
    """Rows of a parquet file, or of an arrow file or stream (`datasets` writes streams)."""
    import pyarrow

    try:
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            twice = [name for name, count in Counter(batch.schema.names).items() if count > 1]
            if twice:
                raise UserError(f"{path}: column {twice[0]!r} comes more than once; rename one of them")
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as {kind}: {reason:.200}; copy it again, or correct its name"
        ) from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with path.open("rb") as file, parquet.ParquetFile(file) as opened:
        yield from opened.iter_batches(batch_size=_ROWS_AT_ONCE)


def _arrow(path: Path) -> Iterator[Any]:
    from pyarrow import ipc

    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            opened = ipc.open_file(file)
            yield from (opened.get_batch(index) for index in range(opened.num_record_batches))
        else:
            yield from ipc.open_stream(file)
