"""What a run directory's own records say, read leniently: a killed run has a report too."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError
from rlhf.tracking.records import METRICS, SAMPLES, read_rows
from rlhf.tracking.redact import redact, redact_text

_LARGEST_RECIPE_BYTES = 2**20
_MOST_SETTINGS = 2000  # an alias bomb in a recipe is small on disk and endless when unfolded
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the other one is quadratic in the depth of nesting
_NOT_A_SOURCE = ("score", "penalized", "weighted", "valid")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """path: the directory. run: run.json. rows: metrics by step, one mapping a step. samples: rows of samples.jsonl.
    settings: the recipe flattened, ``kl.beta`` → value. broken: unreadable lines."""

    path: Path
    recipe_text: str
    settings: Mapping[str, Any]
    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    broken: int

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def yardstick(self) -> str | None:
        """The score that is measured and not trained on: ``gold``, or a reward function of weight 0."""
        sources = dict.fromkeys(
            match[1] for row in self.rows for key in row if (match := re.fullmatch(r"reward/([^/]+)_mean", key))
        )
        named = [name for name in sources if name not in _NOT_A_SOURCE]
        weightless = [name for name in named if self._weight(name) == 0]
        return "gold" if "gold" in named else weightless[0] if weightless else None

    @cached_property
    def loss(self) -> str | None:
        """The main loss curve's name."""
        keys = dict.fromkeys(
            key for row in self.rows for key in row if re.fullmatch(r"policy/(\w+_)?loss|loss/\w+", key)
        )
        return "policy/loss" if "policy/loss" in keys else next(iter(keys), None)

    def has(self, key: str) -> bool:
        return bool(self.curve(key)[0])

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a metric, without the steps where it is missing or not finite."""
        return self.against("step", key)

    def against(self, across: str, up: str) -> tuple[list[float], list[float]]:
        """Two metrics of the same steps."""
        points = [(row[across], row[up]) for row in self.rows if _finite(row.get(across)) and _finite(row.get(up))]
        return [float(x) for x, _ in points], [float(y) for _, y in points]

    def last(self, *keys: str) -> float | None:
        """Mean of the last tenth of the first of these metrics that exists."""
        for key in keys:
            values = self.curve(key)[1]
            if values:
                tail = values[-max(len(values) // 10, 1) :]
                return sum(tail) / len(tail)
        return None

    def _weight(self, source: str) -> Any:
        for key, value in self.settings.items():
            if key.startswith("reward.") and key.endswith(".call") and re.split(r"[.:]", str(value))[-1] == source:
                return self.settings.get(key.removesuffix("call") + "weight")
        return None


def read_run(path: Path) -> RunRecord:
    """Reads the four files; raises UserError where there is neither a recipe nor a metric."""
    rows, broken = read_rows(path / METRICS)
    samples, broken_samples = read_rows(path / SAMPLES)
    text = _recipe_text(path / "recipe.yaml")
    if not rows and not text:
        raise UserError(f"{path} holds no run (no recipe.yaml, no metrics.jsonl); name a directory like runs/NAME")
    return RunRecord(
        path=path,
        recipe_text=redact_text(text),
        settings=redact(dict(flatten(_parse(text)))),
        run=_read_json(path / "run.json"),
        rows=_by_step(rows),
        samples=samples,
        broken=broken + broken_samples,
    )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as ``a.b.0`` → leaf, at most _MOST_SETTINGS of them."""
    left = _MOST_SETTINGS
    stack: list[tuple[str, Any]] = [(prefix, value)]
    while stack and left:
        left -= 1
        name, item = stack.pop()
        if isinstance(item, Mapping) and item:
            stack += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(list(item.items()))]
        elif isinstance(item, list) and item:
            stack += [(f"{name}.{index}", inner) for index, inner in reversed(list(enumerate(item)))]
        elif name:
            yield name, None if item in ({}, []) else item


def _by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping a step: evaluations add their line to the same step."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _recipe_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_RECIPE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = redact(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
