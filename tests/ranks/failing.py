"""Rewards that fail on the second of two processes, in the second step."""

from __future__ import annotations

import os


def refuses(completions: list[str], trainer_state: object, **columns: object) -> list[float]:
    """A list that is too short: the user's to mend."""
    return [1.0] * (len(completions) - _now(trainer_state))


def breaks(completions: list[str], trainer_state: object, **columns: object) -> list[float]:
    """An end that nothing foresaw."""
    if _now(trainer_state):
        os._exit(9)
    return [1.0] * len(completions)


def _now(state: object) -> bool:
    return os.environ["RANK"] == "1" and state.global_step == 2  # type: ignore[attr-defined]
