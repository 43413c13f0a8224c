"""One recipe trained with either engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import rlhf
from rlhf.errors import ExitCode
from rlhf.models.scratch import build_causal_lm, build_config
from tests.sampling.test_hf import TOKENIZER

# The reward is the share of vowels: dense, so that five steps show.
RECIPE = """
objective: reinforce
run: {name: five, seed: 7, steps: 5}
policy: {path: start, compute_dtype: float32}
reward: {functions: [{call: "tests.vllm.runs:vowels"}], missing_eos_score: null}
data:
  train: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 32}]
  eval: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 32}]
rollout: {samples_per_prompt: 8, max_new_tokens: 16}
kl: {beta: 0.01}
optim: {lr: 1.0e-2}
batch: {prompts_per_step: 16, microbatch_tokens: 4096}
eval: {every_steps: 5, samples: 32}
tracking: {to: []}
"""


def vowels(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    texts = [turns[-1]["content"] for turns in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


@dataclass(frozen=True)
class Learned:
    """rewards: of each step. gap: largest ``policy/sampler_gap``."""

    rewards: list[float]
    gap: float

    @property
    def gain(self) -> float:
        """Of the last step over the first."""
        return self.rewards[-1] - self.rewards[0]


def prepare(folder: Path) -> None:
    """A policy to start from, and ``recipe.yaml``."""
    config = build_config("gemma", layers=2, hidden_size=64, heads=2, vocab_size=len(TOKENIZER))
    build_causal_lm(config, seed=3).save_pretrained(folder / "start")
    TOKENIZER.save_pretrained(folder / "start")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def learned(out: Path, *overrides: str) -> Learned:
    """A run of the recipe in this folder."""
    assert rlhf.train("recipe.yaml", f"run.output_dir={out}", *overrides) == ExitCode.DONE
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "policy/loss" in row]
    rewards = [row["reward/score_mean"] for row in steps]
    return Learned(rewards, max(row["policy/sampler_gap"] for row in steps))
