"""What a run's inputs contained when it started, so that a resumed run notices another content under the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_WHOLE_BYTES = 64 * 2**20  # larger files are read at both ends: hashing 50 GiB of weights would delay every start
_END_BYTES = 2**20
_NOT_CONTENT = {"README.md"}  # a model card may be rewritten


def fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and bytes of a file, or of every file directly in a folder.

    Of a file above 64 MiB the first and last MiB stand for the rest, with its size. Raises OSError.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _files(path):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_bytes_digest(file))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in _NOT_CONTENT)


def _bytes_digest(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").digest()
        digest = hashlib.sha256(stream.read(_END_BYTES))
        stream.seek(size - _END_BYTES)
        digest.update(stream.read())
    return digest.digest()
