"""The kinds of data files, by suffix. Torch-free: the rules of a recipe read this table too."""

from __future__ import annotations

from pathlib import PurePath

TEXT_KINDS = ("jsonl", "json", "csv", "tsv")  # each may be gzip-compressed: train.jsonl.gz
TABLE_KINDS = ("parquet", "arrow")  # compressed inside
SUFFIXES = (
    *(f".{kind}" for kind in (*TEXT_KINDS, *TABLE_KINDS)),
    *(f".{kind}.gz" for kind in TEXT_KINDS),
)
SUFFIXES_IN_WORDS = f"{', '.join(f'.{kind}' for kind in TEXT_KINDS)} (each also .gz), .parquet or .arrow"


def suffix_of(path: str | PurePath) -> str | None:
    """``.jsonl.gz`` of ``Train.JSONL.gz``; None for a name that ends in no suffix we read."""
    name = PurePath(path).name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=None)


def kind_of(path: str | PurePath) -> str | None:
    """``jsonl`` of ``train.jsonl.gz``: what the content is once it is decompressed."""
    suffix = suffix_of(path)
    return None if suffix is None else suffix.removesuffix(".gz").removeprefix(".")
