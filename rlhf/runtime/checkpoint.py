"""Checkpoints that survive ``kill -9``: staged, hashed, committed by one rename, pruned afterwards.

Storage only: nothing here knows a model or an optimizer. A checkpoint is a directory ``step-00000100`` of safetensors
files, ``state.json`` and ``manifest.json``; no pickle is written or read. On several processes only rank 0 saves, with
full tensors that the caller has gathered, and every rank may load.

The order of a save: stage in a hidden directory, fsync each file, write the manifest, one rename, fsync the parent,
prune. At every moment the newest complete checkpoint stays loadable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.runtime.manifest import (
    MANIFEST,
    CheckpointInvalid,
    Manifest,
    library_versions,
    record_of,
    sync_directory,
    sync_file,
    verify,
    write_json_atomic,
    write_text_synced,
)
from rlhf.runtime.rng import restore_rng, rng_tensors
from rlhf.runtime.step_directories import (
    STEP_NAME,
    checkpoint_steps,
    failpoint,
    hidden,
    ours,
    prune,
    recover,
    step_directory,
)

__all__ = [
    "CheckpointFailed",
    "CheckpointInvalid",
    "Loaded",
    "Newest",
    "checkpoint_steps",
    "failpoint",
    "load_checkpoint",
    "newest_checkpoint",
    "recover",
    "restore_rng",
    "rng_tensors",
    "save_checkpoint",
    "step_directory",
    "write_json_atomic",
]

STATE = "state.json"
SHARD_BYTES = 4 * 2**30  # a tensor larger than this gets a file of its own

_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SPARE_BYTES = 2**20  # manifest, state and file-system blocks


class CheckpointFailed(Exception):
    """A checkpoint could not be written, twice. Earlier checkpoints are untouched; the run may go on and try later."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified checkpoint. files: tensors (on the CPU) by file name and tensor name, as given to save_checkpoint."""

    step: int
    files: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class Newest(NamedTuple):
    """path: the newest complete checkpoint, None if there is none. notes: one line for each one skipped, and why."""

    path: Path | None
    notes: tuple[str, ...] = ()


def save_checkpoint(
    root: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Writes ``root/step-<step>`` and removes old checkpoints. Call on rank 0 only, one caller per root at a time.

    files: tensors by file name, any dtype and device; tensors that share memory are stored apart. state: JSON values
    with string keys (floats come back bit for bit). keep: how many of the newest checkpoints up to this step stay;
    those of the steps in ``protect`` stay besides. If writing fails, the oldest spare checkpoint makes room and it is
    tried once more.

    Raises CheckpointFailed when the disk will not take it, ValueError or TypeError for what could never be saved.
    """
    text = _state_text(state)
    _check_arguments(step, files, keep)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        recover(root)
    except OSError as error:
        raise CheckpointFailed(f"no checkpoint of step {step} in {root}: {error}") from error
    first_error: Exception | None = None
    for _ in range(2):
        try:
            path = _write(root, step, files, text)
            break
        except Exception as error:  # safetensors and torch raise their own classes on a full disk, not OSError
            if first_error is not None:
                raise CheckpointFailed(_failure(root, step, files, error)) from error
            first_error = error
            _make_room(root, keep, protect)
    prune(root, step, keep, {step, *protect})
    return path


def load_checkpoint(path: Path) -> Loaded:
    """Reads a checkpoint directory after checking the manifest and every hash.

    Raises CheckpointInvalid naming the file: missing, truncated, changed, added, swapped or linked.
    """
    manifest = verify(path)
    _check_step(path, manifest)
    files = {name: _load_parts(path, parts) for name, parts in manifest.parts.items()}
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"{path / STATE}: {error}") from error
    return Loaded(step=manifest.step, files=files, state=state)


def newest_checkpoint(root: Path) -> Newest:
    """The newest directory of ``root`` that is complete and unchanged, every hash checked; reads only.

    Names other than ``step-`` and eight digits, files and symbolic links are not looked at. Raises OSError only where
    ``root`` itself exists and cannot be listed.
    """
    notes = []
    for step in reversed(checkpoint_steps(root)):
        path = step_directory(root, step)
        try:
            _check_step(path, verify(path))
        except (CheckpointInvalid, OSError) as error:
            notes.append(f"skipped {path.name}: {error}")
            continue
        return Newest(path, tuple(notes))
    return Newest(None, tuple(notes))


def _write(root: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state_text: str) -> Path:
    needed = _bytes_of(files) + _SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{needed} bytes needed, {free} free")
    staging = root / hidden("staging", step)
    staging.mkdir(mode=0o700)
    try:
        parts = {}
        for name, tensors in files.items():
            parts[name] = _write_parts(staging, name, tensors)
            failpoint("after_model", step)
        write_text_synced(staging / STATE, state_text)
        failpoint("before_manifest", step)
        _write_manifest(staging, step, parts)
        failpoint("before_rename", step)
        path = _commit(root, staging, step)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    failpoint("after_rename", step)
    return path


def _write_parts(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    shards = _shards(tensors)
    count = len(shards)
    written = []
    for index, keys in enumerate(shards, 1):
        file = f"{name}.safetensors" if count == 1 else f"{name}-{index:05d}-of-{count:05d}.safetensors"
        path = directory / file
        if path.exists():
            raise ValueError(f"two entries of the checkpoint would both be written to {file}")
        save_file(_separate({key: tensors[key] for key in keys}), path)
        path.chmod(0o600)
        sync_file(path)
        written.append(file)
    return tuple(written)


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in order, cut so that each file stays within SHARD_BYTES; at least one file, also for no tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU tensors of which no two share storage (safetensors refuses tied weights and views)."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().to("cpu").contiguous()
        storage = dense.untyped_storage().data_ptr()
        separate[name] = dense.clone() if storage in seen else dense
        seen.add(storage)
    return separate


def _write_manifest(staging: Path, step: int, parts: Mapping[str, tuple[str, ...]]) -> None:
    names = [file for files in parts.values() for file in files] + [STATE]
    manifest = Manifest(
        step=step,
        files={name: record_of(staging / name) for name in names},
        parts=parts,
        libraries=library_versions(),
    )
    write_text_synced(staging / MANIFEST, manifest.to_text())
    sync_directory(staging)


def _commit(root: Path, staging: Path, step: int) -> Path:
    final = step_directory(root, step)
    if not os.path.lexists(final):
        os.rename(staging, final)
        sync_directory(root)
        return final
    if final.is_dir() and not final.is_symlink() and not ours(final):
        raise FileExistsError(f"{final} exists and was not written by this program")
    # The same step once more: the old one steps aside and comes back (recover) if we die between the two renames.
    aside = root / hidden("replaced", step)
    os.rename(final, aside)
    os.rename(staging, final)
    sync_directory(root)
    shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
    return final


def _make_room(root: Path, keep: int, protect: Collection[int]) -> None:
    """Gives up one spare checkpoint, never the newest complete one."""
    newest = newest_checkpoint(root).path
    if newest is None:
        return
    step = int(newest.name.removeprefix("step-"))
    prune(root, step, max(keep - 1, 1), {step, *protect})


def _load_parts(directory: Path, parts: tuple[str, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in parts:
        try:
            tensors.update(load_file(directory / file))
        except Exception as error:  # SafetensorError is not exported as a stable name
            raise CheckpointInvalid(f"{directory / file}: not a safetensors file ({error})") from error
    return tensors


def _check_step(path: Path, manifest: Manifest) -> None:
    match = STEP_NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointInvalid(f"{path / MANIFEST}: is of step {manifest.step}, the directory is named {path.name}")


def _check_arguments(step: int, files: Mapping[str, Mapping[str, Tensor]], keep: int) -> None:
    if not 0 <= step < 10**8:
        raise ValueError(f"step {step} is outside 0 … 99999999")
    if keep < 1:
        raise ValueError(f"keep = {keep} would delete the checkpoint just written; it must be at least 1")
    for name, tensors in files.items():
        if not _PART_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a file of a checkpoint: letters, digits, '.', '_', '-', at most 64")
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout != torch.strided:
                raise TypeError(f"{name}[{key!r}] is not a dense tensor in memory")


def _state_text(state: Mapping[str, Any]) -> str:
    """JSON in Python's dialect: an infinite running mean must come back as it was, so Infinity and NaN are kept."""
    _check_keys(state, "state")
    return json.dumps(dict(state), indent=2) + "\n"


def _check_keys(value: Any, where: str) -> None:
    """JSON would turn the key 1 into '1' without a word."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; the keys of a checkpoint's state are strings")
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_keys(item, f"{where}[{index}]")


def _bytes_of(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def _failure(root: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], error: Exception) -> str:
    newest = newest_checkpoint(root).path
    left = f"{newest.name} is untouched" if newest else "there is no earlier one"
    size = _bytes_of(files) / 2**20
    return f"no checkpoint of step {step} in {root}: {error} ({size:.1f} MiB of tensors, tried twice); {left}"
