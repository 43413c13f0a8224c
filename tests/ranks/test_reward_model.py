"""A reward model trained by one process, two DDP ranks and two ZeRO-3 ranks, in full and through LoRA, is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import start

RECIPE = """
objective: reward
run: {name: one, seed: 3, steps: 3}
policy: {path: start, compute_dtype: float32}
data:
  train: [{path: "rlhf.data.quickstart:preferences", max_rows: 64}]
  eval: [{path: "rlhf.data.quickstart:preferences", max_rows: 15}]
optim: {lr: 1.0e-3}
batch: {prompts_per_step: 6, microbatch_tokens: 512}
checkpoint: {every_steps: null}
tracking: {to: []}
"""
LORA = ("policy.lora.r=4", "policy.lora.alpha=8")


KINDS: dict[str, tuple[str, ...]] = {"full": (), "lora": LORA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds trained by one process, by two under DDP, and by two under ZeRO-3."""
    place = tmp_path_factory.mktemp("reward")
    start.write(place, RECIPE)
    for where in ("alone", "cpu_2ranks", "cpu_zero3"):
        config = None if where == "alone" else start.CONFIGS / f"{where}.yaml"
        start.train_several(place, config, [(f"run.name={kind}-{where}", *more) for kind, more in KINDS.items()])
    return place


def trained(folder: Path, name: str) -> tuple[torch.Tensor, dict[str, float]]:
    """(all weights of final/, the last held-out figures)."""
    run = folder / "runs" / f"{name}-reward"
    weights = load_file(run / "final" / "model.safetensors")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = next(row for row in reversed(rows) if "eval/accuracy" in row)
    return torch.cat([weights[key].flatten() for key in sorted(weights)]), figures


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["cpu_2ranks", "cpu_zero3"])
def test_two_ranks_train_the_reward_model_of_one(kind: str, config: str, folder: Path) -> None:
    weights, figures = trained(folder, f"{kind}-alone")
    got, told = trained(folder, f"{kind}-{config}")
    assert start.apart(weights, got) <= 1e-5
    for name in ("eval/accuracy", "eval/margin", "eval/calibration_error"):
        assert told[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-5), name
