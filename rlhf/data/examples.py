"""Data as the supervised and preference programs take it; the policy loop takes ``rlhf.rollout.Prompt`` itself."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.rollout import Prompt


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a completion to imitate. Plain text without a prompt has ``prompt.text == ""``."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the first preferred. ``margin`` is how much better it was rated, when known."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
