"""Architectures of public models by name, for machines from which the hub cannot be reached."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml


def known_config(name: str) -> Any | None:
    """The transformers configuration of a public model (``google/gemma-2-9b-it``); None where it is not in the table.

    Only the architecture: nothing of the tokenizer, of stop tokens or of weights.
    """
    from transformers import AutoConfig

    values = _table().get(name.lower().removesuffix("-it").removesuffix("-pt"))
    if values is None:
        return None
    return cast(Any, AutoConfig).for_model(**values)


def known_names() -> tuple[str, ...]:
    """Every name in the table."""
    return tuple(_table())


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = (Path(__file__).parent / "families.yaml").read_text(encoding="utf-8")
    return {name.lower(): values for name, values in yaml.safe_load(text).items()}
