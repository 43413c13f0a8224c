"""A recipe of two steps on a Gemma of one layer, and a run of it read back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlhf
from rlhf.errors import ExitCode

SCRATCH = "{scratch: {family: gemma, layers: 1, hidden_size: 32, heads: 2, vocab_size: 512}, compute_dtype: float32}"
# The schedule's horizon is the run's own two steps; the first has the full learning rate.
RECIPE = """
objective: reinforce
run: {name: tiny, seed: 7, steps: 2}
policy: {path: "SFT", compute_dtype: float32}
reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}
data:
  train: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 16}]
  instruction: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 16}]
rollout: {samples_per_prompt: 2, max_new_tokens: 8}
kl: {beta: 0.1}
optim: {lr: 1.0e-2}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
eval: {every_steps: null}
checkpoint: {every_steps: 1}
tracking: {to: []}
"""
LORA = ("policy.lora.r=4", "policy.lora.alpha=8")


@dataclass(frozen=True)
class Run:
    """A run directory, read back."""

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return found

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row of the training steps each."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "policy/loss" in row]

    @property
    def weights(self) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(self.path / "final")
        return {name: value.detach() for name, value in model.state_dict().items()}


def train(recipe: str, *overrides: str, name: str = "tiny") -> Run:
    code = rlhf.train(recipe, f"run.name={name}", *overrides)
    assert code == ExitCode.DONE
    return Run(Path("runs") / f"{name}-reinforce")


def assert_sound(run: Run, sft: Path) -> None:
    """Finished; finite; it began at the reference exactly and left it; ``final/`` is a model that has learned."""
    assert (run.record["status"], run.record["exit_code"], run.record["step"]) == ("finished", 0, 2)
    first, second = run.metrics
    assert (first["step"], second["step"]) == (1, 2)
    numbers = {name: value for row in (first, second) for name, value in row.items() if isinstance(value, int | float)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert first["optim/grad_norm"] > 0 and first["optim/skipped"] == 0
    assert first["kl/reference"] == 0 and first["kl/reference_per_token"] == 0  # to the last bit
    assert second["kl/reference"] != 0
    before = AutoModelForCausalLM.from_pretrained(sft).state_dict()
    after = run.weights
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())
    assert all(bool(value.isfinite().all()) for value in after.values())
