"""Weights & Biases."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.tracking.mirror import COLUMNS, brief, cells, relative
from rlhf.tracking.redact import redact

INIT_SECONDS = 8.0
FINISH_SECONDS = 30.0


class Wandb:
    """Sends metrics and a growing table of samples to wandb.

    Offline without a key or without an answer from the server (``WANDB_MODE`` overrides), and then one line says how
    to sync. It never prompts. Used directly and not through accelerate, whose ``log_table`` makes immutable tables: a
    page then shows the last one only.
    """

    def __init__(
        self,
        run: Path,
        *,
        project: str,
        run_name: str,
        config: Mapping[str, Any],
        note: Callable[[str], None],
        fresh: bool = True,
    ) -> None:
        self._table: Any = None
        try:
            self._run = _start(run, project, run_name, redact(config), fresh, note)
        except Exception:
            self.abandon()
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to one table; the incremental kind, because the usual one shows only its last state."""
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*cells({**row, "step": step}))
        self._run.log({"samples": self._table}, step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)

    def abandon(self) -> None:
        """Drops wandb's helper process; with one that died, its exit hook would print a traceback."""
        with suppress(Exception):
            import wandb

            wandb.teardown()


def _start(run: Path, project: str, name: str, config: Any, fresh: bool, note: Callable[[str], None]) -> Any:
    """The started run, online where that works. Says once where it can be seen or how to upload it."""
    mode, why = _mode(), "no WANDB_API_KEY"
    options = {"project": project, "name": name, "id": _run_id(run, fresh), "dir": str(run), "config": config}
    try:
        started = _init(mode, options)
    except Exception as error:
        if mode != "online":
            raise
        import wandb

        mode, why = "offline", brief(error)
        with suppress(Exception):
            wandb.teardown()
        started = _init(mode, options)
    if mode == "offline":
        folder = relative(Path(started.dir).parent)
        note(f"wandb is offline ({why}); to upload this run: wandb sync {folder}")
    elif mode == "online":
        note(f"wandb: {started.url}")
    return started


def _init(mode: Any, options: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off", disable_git=True
    )
    resume = "allow" if mode == "online" else None
    return wandb.init(mode=mode, settings=settings, resume=resume, **options)  # type: ignore[arg-type]


def _mode() -> Any:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"


def _logged_in() -> bool:
    """Whether ``wandb login`` has left a key for the server in use. Looked up here because wandb would prompt."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run: Path, fresh: bool) -> str:
    """The same id for every restart of a run, so that wandb shows one curve; a new one for a fresh start."""
    path = run / "wandb" / "run-id"
    if not fresh and path.exists():
        return path.read_text().strip()
    path.parent.mkdir(exist_ok=True)
    path.write_text(secrets.token_hex(4))
    return path.read_text()
