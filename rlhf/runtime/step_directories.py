"""Checkpoint directories by name: which there are, what a killed save left behind, which may be deleted.

Links are never followed, and nothing is deleted that this program did not make.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

from rlhf.runtime.manifest import FORMAT, MANIFEST, CheckpointInvalid, read_manifest

FAILPOINT_VARIABLE = "RLHF_TEST_FAILPOINT"
STEP_NAME = re.compile(r"step-([0-9]{8})")
_HIDDEN_NAME = re.compile(r"\.(staging|pruned|replaced)-(step-[0-9]{8})-[0-9a-f]{8}")


def failpoint(name: str, step: int) -> None:
    """Dies by SIGKILL here when the test variable names this point, as ``name`` or ``name@step``."""
    wanted = os.environ.get(FAILPOINT_VARIABLE)
    if wanted and wanted in (name, f"{name}@{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a directory in ``root``, ascending, complete or not. No root, no steps."""
    return sorted(int(match[1]) for entry, match in _directories(root, STEP_NAME))


def recover(root: Path) -> None:
    """Clears what a killed save left behind: staging directories go, a checkpoint under replacement comes back."""
    for path, match in list(_directories(root, _HIDDEN_NAME)):
        final = root / match[2]
        if match[1] == "replaced" and not os.path.lexists(final):
            os.rename(path, final)
        else:
            shutil.rmtree(path)


def prune(root: Path, step: int, keep: int, spared: Collection[int]) -> None:
    """Removes all but the newest ``keep`` checkpoints up to ``step``; higher steps belong to somebody else."""
    candidates = [s for s in checkpoint_steps(root) if s <= step and ours(step_directory(root, s))]
    for candidate in candidates[: max(len(candidates) - keep, 0)]:
        if candidate in spared:
            continue
        doomed = root / hidden("pruned", candidate)
        try:
            os.rename(step_directory(root, candidate), doomed)
            failpoint("mid_prune", step)
            shutil.rmtree(doomed)
        except OSError:
            continue  # the checkpoint itself is safe; recover() tries again at the next save


def ours(path: Path) -> bool:
    """Only a directory with our manifest is ever deleted, be it complete or damaged."""
    manifest = path / MANIFEST
    if manifest.is_symlink() or not manifest.is_file():
        return False
    try:
        read_manifest(path)
    except CheckpointInvalid:
        return FORMAT.encode() in manifest.read_bytes()[:200]
    return True


def _directories(root: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    """Real directories of ``root`` whose whole name matches; links are never followed."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match and entry.is_dir(follow_symlinks=False):
                    yield Path(entry.path), match
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise  # an unreadable root must not look like an empty one


def hidden(kind: str, step: int) -> str:
    """A fresh name that no loader looks at; kind: staging, pruned or replaced."""
    return f".{kind}-step-{step:08d}-{secrets.token_hex(4)}"
