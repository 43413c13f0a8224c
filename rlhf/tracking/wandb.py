"""Weights & Biases as a mirror of the run's own records. Nothing it does or fails to do can stop a run."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.tracking.redact import printable, redact, redact_text

COLUMNS = ("step", "phase", "prompt", "completion", "reward", "kl", "finished", "scores")
INIT_SECONDS = 8.0
FINISH_SECONDS = 30.0


class WandbMirror:
    """Sends metrics and a growing table of samples to wandb.

    Offline without a key or without an answer from the server (``WANDB_MODE`` overrides), and then one line says how
    to sync. It never prompts. The first failure is reported once; after it the mirror is silent and the run goes on.
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
        self._note = note
        self._run: Any = None
        self._table: Any = None
        try:
            self._start(run, project, run_name, redact(config), fresh)
        except Exception as error:
            self._give_up("start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try("log", lambda: self._run.log(dict(metrics), step=step))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to one table; the incremental kind, because the usual one shows only its last state."""
        self._try("log samples", lambda: self._log_rows(step, rows))

    def close(self, status: str) -> None:
        self._try("finish", lambda: self._run.finish(exit_code=0 if status == "finished" else 1))
        self._run = None

    def _start(self, run: Path, project: str, name: str, config: Any, fresh: bool) -> None:
        mode, why = _mode(), "no WANDB_API_KEY"
        options = {"project": project, "name": name, "id": _run_id(run, fresh), "dir": str(run), "config": config}
        try:
            self._run = _init(mode, options)
        except Exception as error:
            if mode != "online":
                raise
            mode, why = "offline", _brief(error)
            _forget()
            self._run = _init(mode, options)
        if mode == "offline":
            folder = Path(self._run.dir).parent
            self._note(f"wandb is offline ({why}); to upload this run: wandb sync {_relative(folder)}")
        elif mode == "online":
            self._note(f"wandb: {self._run.url}")

    def _log_rows(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(*_cells({**row, "step": step}))
        self._run.log({"samples": self._table}, step=step)

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # its helper process may have died, the disk be full, the network gone
            self._give_up(what, error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        self._note(f"wandb could not {what} ({_brief(error)}); the run goes on without it")
        _forget()


def _forget() -> None:
    """Drops wandb's helper process; with one that died, its exit hook would print a traceback."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _init(mode: Any, options: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off", disable_git=True
    )
    resume = "allow" if mode == "online" else None
    return wandb.init(mode=mode, settings=settings, resume=resume, **options)  # type: ignore[arg-type]


def _brief(error: Exception) -> str:
    return redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


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


def _cells(row: Mapping[str, Any]) -> list[Any]:
    scores = row.get("scores") or {}
    texts = {"prompt": printable(str(row.get("prompt", ""))), "completion": printable(str(row.get("completion", "")))}
    shown = {**row, **texts, "scores": "  ".join(f"{name}={value}" for name, value in scores.items())}
    return [shown.get(column) for column in COLUMNS]


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
