"""``rlhf train --accelerate``: starts the ranks through ``accelerate launch`` and answers for them.

accelerate turns every exit code of a child into 1 and forwards no SIGTERM to a single child. So signals go straight to
the ranks from here, and the exit code is what rank 0 left in a file, or else in ``run.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from rlhf.errors import ExitCode, UserError

EXIT_CODE_FILE = "RLHF_EXIT_CODE_FILE"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CLOCK_SLACK_SECONDS = 2.0


def spawn(config: Path, arguments: Sequence[str], output_dir: Path) -> ExitCode:
    """Runs ``rlhf ARGUMENTS`` on the processes of an accelerate configuration and returns how the run ended.

    output_dir: the recipe's run directory (``run.resume=never`` may number it). Raises UserError for a configuration
    that cannot be read or has no device here.
    """
    started = time.time() - _CLOCK_SLACK_SECONDS
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command = [*launcher, *_process_count(config), "-m", "rlhf", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "exit-code"
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which forwards it once.
        process = subprocess.Popen(command, start_new_session=True, env={**os.environ, EXIT_CODE_FILE: str(said)})
        with _forwarding(process):
            code = process.wait()
        return exit_code(said, output_dir, started, code)


def exit_code(said: Path, output_dir: Path, started: float, launcher_code: int) -> ExitCode:
    """How the run that began after ``started`` (seconds since the epoch) ended.

    By what rank 0 said on leaving, else (it was killed first) by its run.json. With neither, a launcher that ended well
    is believed and any other is a bug.
    """
    with contextlib.suppress(OSError, ValueError):
        return ExitCode(int(said.read_text(encoding="utf-8")))
    records = [_record(path / "run.json") for path in (output_dir, *_numbered(output_dir))]
    ours = [record for record in records if _seconds(record.get("ended")) >= started]
    newest = max(ours, key=lambda record: _seconds(record.get("ended")), default={})
    if newest.get("exit_code") in list(ExitCode):
        return ExitCode(newest["exit_code"])
    return ExitCode.DONE if launcher_code == 0 else ExitCode.BUG


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        ranks = _ranks(process.pid)
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:  # nothing to save yet
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks(launcher: int) -> list[Any]:
    """The processes that train: the nearest descendants of the launcher that run this package."""
    import psutil

    def below(process: Any) -> Iterator[Any]:
        for child in process.children():
            if "rlhf" in child.cmdline():
                yield child
            else:
                yield from below(child)

    try:
        return list(below(psutil.Process(launcher)))
    except psutil.NoSuchProcess:
        return []


def _process_count(config: Path) -> list[str]:
    """``--num_processes`` for the GPUs at hand; a CPU configuration says its own number."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{config}: not an accelerate configuration ({error.__class__.__name__})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{config}: not an accelerate configuration; `accelerate config` writes one")
    several_machines = int(settings.get("num_machines") or 1) > 1
    if settings.get("use_cpu") or several_machines:
        return []
    import torch

    found = torch.cuda.device_count()
    if found == 0:
        raise UserError(f"{config}: is for GPUs and there is none here; use --accelerate cpu or cpu_2ranks")
    one = settings.get("distributed_type") == "NO"
    return ["--num_processes", "1" if one else str(found)]


def _numbered(output_dir: Path) -> list[Path]:
    return sorted(output_dir.parent.glob(f"{output_dir.name}-[0-9]*"))


def _record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _seconds(when: Any) -> float:
    """Seconds since the epoch of an ISO time stamp; 0 where there is none."""
    try:
        stamp = datetime.fromisoformat(when)
    except (TypeError, ValueError):
        return 0.0
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
