"""The ways a run can end, and the one exception that is the user's to fix."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; the same word is written to ``run.json`` as the exit reason."""

    DONE = 0
    BUG = 1
    USER = 2
    DIVERGED = 70
    OUT_OF_MEMORY = 71
    DISK = 74
    REWARD_GONE = 75
    PREEMPTED = 143


class UserError(Exception):
    """Input that cannot work. The message says what was given, why it cannot work and what to set.

    Shown without a traceback; the process exits with ``code`` (2 unless said otherwise).
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USER) -> None:
        super().__init__(message)
        self.code = code
