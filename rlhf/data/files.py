"""A local file → its rows, whatever its kind. What a file holds is checked against what its name promises."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.data import tables
from rlhf.data.checked import NotARow, PlacedRow, checked
from rlhf.data.dropped import Dropped
from rlhf.data.kinds import SUFFIXES, SUFFIXES_IN_WORDS, TABLE_KINDS, kind_of
from rlhf.errors import UserError

LONGEST_LINE = 16 * 2**20  # bytes; a longer row is a book or a broken file, and a tokenizer needs minutes for it

# First bytes → what the file is, and what to do. Looked at after decompression too.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed", "let its name end in .gz after the kind: train.jsonl.gz"),
    (b"PAR1", "a parquet file", "let its name end in .parquet"),
    (b"ARROW1", "an arrow file", "let its name end in .arrow"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "bzip2-compressed", "unpack it, or compress it with gzip"),
    (b"\xfd7zXZ", "xz-compressed", "unpack it, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it, or compress it with gzip"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself", "fetch it with `git lfs pull`"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8"),
)


def file_rows(path: Path, dropped: Dropped) -> Iterator[PlacedRow]:
    """(place, row) of every usable row; places are ``file:line``, or ``file, row N`` where the kind has no lines."""
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: files end in {SUFFIXES_IN_WORDS}; convert it, one JSON object per line")
    with _told_by_name(path):
        if kind in TABLE_KINDS:
            yield from checked(enumerate(tables.table(path, kind)), f"{path}, row ", dropped)
            return
        with _opened(path) as stream:
            _is_what_it_says(path, stream)
            if kind in ("csv", "tsv"):
                yield from checked(tables.delimited(path, stream, kind, LONGEST_LINE), f"{path}:", dropped)
            else:
                yield from _json_rows(path, stream, kind, dropped)


def file_of_split(folder: Path, split: str) -> Path | None:
    """``<split>.<suffix>`` in a folder. Raises UserError where several kinds lie there, rather than choosing one."""
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} holds {names}, and each could be split {split!r}; set data.*.path to one of them")
    return found[0] if found else None


def _opened(path: Path) -> tables.ByteStream:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _told_by_name(path: Path) -> Iterator[None]:
    """What goes wrong while a file is read, as one line with its name."""
    try:
        yield
    except gzip.BadGzipFile as error:
        raise UserError(
            f"{path} is no gzip file, or is damaged ({error}); take .gz off its name, or copy it again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; check data.*.path") from error


def _is_what_it_says(path: Path, stream: tables.ByteStream) -> None:
    head = bytes(stream.peek(64)[:64])
    for magic, what, advice in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"{path} is {what}; {advice}")
    if b"\0" in head:
        raise UserError(f"{path} begins with NUL bytes, so it is binary or UTF-16; convert it to UTF-8 text")


def _json_rows(path: Path, stream: tables.ByteStream, kind: str, dropped: Dropped) -> Iterator[PlacedRow]:
    # Lines end at "\n" only: U+2028 may stand unescaped inside a JSON string.
    lines = _lines(path, stream)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if kind == "json" and not _is_a_row(first[1]):
        text = "\n" * (first[0] - 1) + first[1] + "".join(line for _, line in lines)  # the same line numbers
        yield from checked(enumerate(_whole_file(path, text)), f"{path}, element ", dropped)
        return
    yield from checked(((number, _parsed(line)) for number, line in _after(first, lines)), f"{path}:", dropped)


def _after(first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from ((number, line) for number, line in lines if line.strip())


def _lines(path: Path, stream: tables.ByteStream) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error


def _is_a_row(line: str) -> bool:
    return line.lstrip().startswith("{") and not isinstance(_parsed(line), NotARow)


def _whole_file(path: Path, text: str) -> list[Any]:
    """A .json file that is not one object a line: a list of rows."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); correct that line") from error
    except (ValueError, RecursionError, NotARow) as error:
        raise UserError(f"{path}: not valid JSON ({error}); correct it") from error
    if not isinstance(value, list):
        has = f"one object with the keys {sorted(value)[:8]}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{path} holds {has}; a .json file is a list of rows, or has one object per line")
    return value


def _parsed(line: str) -> Any:
    """The value of a line, or why it has none."""
    if len(line) > LONGEST_LINE:
        return NotARow(f"a line longer than {LONGEST_LINE // 2**20} MiB", f"{len(line)} characters")
    try:
        return json.loads(line, object_pairs_hook=_object)
    except NotARow as bad:
        return bad
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and an integer of 5000 digits
        return NotARow("not valid JSON", str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON lets a key come twice, and then nobody knows which of the two was meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotARow("a key comes twice in one object", repr(twice))
    return found
