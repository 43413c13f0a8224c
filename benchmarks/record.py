"""What every recorded benchmark says about itself, and the file it goes to: `results/NAME.json` beside the scripts."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def write(name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Numbers without a date, a machine and a commit cannot be compared with anything: they go in front."""
    origin = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(), "commit": commit()}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**origin, **settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def hardware() -> str:
    """Cores and processor, with the torch build: what a timing depends on first."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(names) or '?'} x {names[0] if names else platform.processor()}, torch {torch.__version__}"


def commit() -> str:
    """The checkout that was measured, wherever the script was started; `+changes` where `rlhf` is not that commit's."""
    changed = _git("status", "--porcelain", "--", "rlhf")
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
