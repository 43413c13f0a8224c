"""Formats of rows: the table of ours, what one of your own is made of, and rows → examples."""

from __future__ import annotations

from rlhf.data.formats.convert import texts, to_demonstrations, to_labelled, to_preferences, to_prompts
from rlhf.data.formats.format import Asked, BadRow, Drop, Format, Pair, Reply, Row, Rows
from rlhf.data.formats.table import FORMATS, TABLE, detect, find
from rlhf.rollout import Turn

__all__ = [
    "FORMATS",
    "TABLE",
    "Asked",
    "BadRow",
    "Drop",
    "Format",
    "Pair",
    "Reply",
    "Row",
    "Rows",
    "Turn",
    "detect",
    "find",
    "texts",
    "to_demonstrations",
    "to_labelled",
    "to_preferences",
    "to_prompts",
]
