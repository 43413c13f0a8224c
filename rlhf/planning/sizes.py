"""Bytes as people write them."""

from __future__ import annotations

import re

from rlhf.errors import UserError

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SHOWN = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def parse_bytes(text: str) -> int:
    """``80GiB`` → 80·2³⁰, ``80GB`` → 80·10⁹. Raises UserError for anything else than a number and a unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"{text!r} is no amount of memory; write 80GiB (2³⁰ bytes each) or 80GB (10⁹)")
    return int(float(found[1]) * _UNITS[found[2]])


def shown(size: float) -> str:
    """Three figures and a binary unit: ``27.4 GiB``."""
    for unit, name in _SHOWN:
        if abs(size) >= unit:
            value = size / unit
            return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f} {name}"
    return f"{size:.0f} B"
