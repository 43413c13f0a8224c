"""Files that are either whole or refused: atomic JSON, SHA-256, and the manifest of a directory.

A manifest lists every file of its directory with size and hash, and carries the hash of its own content, so that a
flipped bit, a truncated, missing, added, swapped or linked file is found before anything is read from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = "rlhf-checkpoint"
FORMAT_VERSION = 1
_MANIFEST_LIMIT_BYTES = 64 * 2**20
_LIBRARIES = ("rlhf", "torch", "safetensors", "numpy", "transformers", "accelerate", "deepspeed", "peft")


class CheckpointInvalid(Exception):
    """A directory that must not be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and content hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint directory holds.

    files: every file but the manifest itself, by name. parts: for each name given to the writer, the files that its
    tensors lie in, in order. libraries: versions that wrote it, for the reader of an old checkpoint.
    """

    step: int
    files: Mapping[str, FileRecord]
    parts: Mapping[str, tuple[str, ...]]
    libraries: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "step": self.step,
            "libraries": dict(self.libraries),
            "parts": {name: list(files) for name, files in self.parts.items()},
            "files": {name: {"bytes": item.bytes, "sha256": item.sha256} for name, item in self.files.items()},
        }
        return {**body, "sha256": _digest(body)}

    def to_text(self) -> str:
        """The one rendering that is accepted: every byte of the file counts."""
        return json.dumps(self.to_json(), indent=2) + "\n"


@cache
def library_versions() -> Mapping[str, str]:
    """Installed versions of the libraries whose change can change a run. Nothing is imported."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json_atomic(path: Path, data: Any) -> None:
    """Writes JSON so that ``path`` holds either the old content or the new one, also after ``kill -9``.

    Raises ValueError for NaN or infinity, which JSON does not know.
    """
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_text_atomic(path, text)


def write_text_atomic(path: Path, text: str) -> None:
    """Same promise as :func:`write_json_atomic`, for text."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_text_synced(partial, text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text_synced(path: Path, text: str) -> None:
    """Creates or overwrites ``path`` (mode 0600) and waits until the disk has it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Waits until the disk has the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Waits until the disk has the directory's entries: a rename is durable only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory, itself checked; the other files are not looked at.

    Raises CheckpointInvalid, naming what is missing or wrong.
    """
    _require_real(directory, stat.S_ISDIR, "directory")
    path = directory / MANIFEST
    _require_real(path, stat.S_ISREG, "file")
    if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise CheckpointInvalid(f"{path}: larger than any manifest")
    try:
        text = path.read_text("utf-8")
        data = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointInvalid(f"{path}: not readable as JSON ({error})") from error
    manifest = _parse(path, data)
    if manifest.to_text() != text:
        raise CheckpointInvalid(f"{path}: was changed after it was written")
    return manifest


def verify(directory: Path) -> Manifest:
    """Checks every file of ``directory`` against its manifest and returns it.

    Raises CheckpointInvalid, naming the first file that is missing, added, linked, or differs in size or content.
    """
    manifest = read_manifest(directory)
    extra = sorted({entry.name for entry in os.scandir(directory)} - set(manifest.files) - {MANIFEST})
    if extra:
        raise CheckpointInvalid(f"{directory / extra[0]}: not listed in {MANIFEST}")
    for name, expected in manifest.files.items():
        _verify_file(directory / name, expected)
    return manifest


def _verify_file(path: Path, expected: FileRecord) -> None:
    _require_real(path, stat.S_ISREG, "file")
    size = path.stat().st_size
    if size != expected.bytes:
        raise CheckpointInvalid(f"{path}: has {size} bytes, {MANIFEST} says {expected.bytes}")
    try:
        found = record_of(path)
    except OSError as error:
        raise CheckpointInvalid(f"{path}: cannot be read ({error})") from error
    if found != expected:
        raise CheckpointInvalid(f"{path}: content differs from the SHA-256 in {MANIFEST}")


def _require_real(path: Path, is_kind: Any, kind: str) -> None:
    """Links are refused: what they point at is not ours and may change under us."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise CheckpointInvalid(f"{path}: missing ({error.strerror})") from error
    if stat.S_ISLNK(mode):
        raise CheckpointInvalid(f"{path}: a symbolic link, which is not followed")
    if not is_kind(mode):
        raise CheckpointInvalid(f"{path}: not a {kind}")


def _parse(path: Path, data: Any) -> Manifest:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointInvalid(f"{path}: not the manifest of a checkpoint")
    if data.get("version") != FORMAT_VERSION:
        raise CheckpointInvalid(
            f"{path}: checkpoint format {str(data.get('version'))[:20]}, this rlhf reads format {FORMAT_VERSION}"
        )
    digest = data.pop("sha256", None)
    if digest != _digest(data):
        raise CheckpointInvalid(f"{path}: was changed after it was written (its own SHA-256 differs)")
    try:
        manifest = Manifest(
            step=int(data["step"]),
            files={name: FileRecord(**item) for name, item in data["files"].items()},
            parts={name: tuple(files) for name, files in data["parts"].items()},
            libraries=data["libraries"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointInvalid(f"{path}: incomplete ({error!r})") from error
    for name in (*manifest.files, *(file for files in manifest.parts.values() for file in files)):
        if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
            raise CheckpointInvalid(f"{path}: lists the name {name!r}, which leaves its directory")
    unlisted = {file for files in manifest.parts.values() for file in files} - set(manifest.files)
    if unlisted:
        raise CheckpointInvalid(f"{path}: has no hash of {sorted(unlisted)[0]}")
    return manifest


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
