"""The recipe as a whole: its sections, and what can be asked of it. Reads no file and imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf.recipe.marks import dump
from rlhf.recipe.sections import (
    Batch,
    Checkpoint,
    Data,
    DataSource,
    Dpo,
    Eval,
    Instruction,
    Kl,
    Optim,
    Policy,
    Ppo,
    Reference,
    ReinforceSettings,
    Reward,
    RewardModelSettings,
    RolloutSettings,
    Run,
    Section,
    Sft,
    Simpo,
    Tracking,
    Trpo,
    Value,
)

__all__ = ["DataSource", "Recipe", "fill", "flat", "json_schema"]


class Recipe(Section):
    """One run. `objective` and `run.name` are required; everything else has a default."""

    objective: str = Field(
        min_length=1,
        description="reinforce | rloo | … | sft | reward (`rlhf recipes --objectives`), or `package.module:Class`.",
    )
    run: Run
    policy: Policy = Policy()
    reference: Reference = Reference()
    value: Value = Value()
    reward: Reward = Reward()
    data: Data = Data()
    rollout: RolloutSettings = RolloutSettings()
    kl: Kl = Kl()
    instruction: Instruction = Instruction()
    reinforce: ReinforceSettings = ReinforceSettings()
    ppo: Ppo = Ppo()
    trpo: Trpo = Trpo()
    dpo: Dpo = Dpo()
    simpo: Simpo = Simpo()
    sft: Sft = Sft()
    reward_model: RewardModelSettings = RewardModelSettings()
    optim: Optim = Optim()
    batch: Batch = Batch()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @property
    def output_dir(self) -> Path:
        """The run directory, placeholders filled in; relative to the working directory."""
        return Path(fill(self.run.output_dir, self.run.name, self.objective)).expanduser()

    def to_yaml(self) -> str:
        """Every key with its value, in the order of the schema; loading it gives an equal recipe."""
        return dump(self.model_dump(mode="json"))

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted key → (mine, the other's) for every value that differs; lists are compared entry by entry."""
        mine, theirs = dict(flat(self.model_dump(mode="json"))), dict(flat(other.model_dump(mode="json")))
        keys = [*mine, *(key for key in theirs if key not in mine)]
        return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def json_schema() -> str:
    """The JSON schema that editors check recipes with (docs/recipe.schema.json)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def fill(output_dir: str, name: str, objective: str) -> str:
    """``output_dir`` with its placeholders replaced; an outside objective's ``module:Class`` becomes a file name."""
    return output_dir.replace("{name}", name).replace("{objective}", re.sub(r"[^A-Za-z0-9._-]", "-", objective))


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, scalar) of nested mappings and lists; an empty one counts as a scalar."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not items:
        yield prefix, value
    for key, entry in items:
        yield from flat(entry, f"{prefix}.{key}" if prefix else str(key))
