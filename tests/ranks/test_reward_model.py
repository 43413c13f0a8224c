"""A reward model trained by one process, two DDP ranks and two ZeRO-3 ranks, in full and through LoRA, is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def trained(folder: Path, name: str, config: str | None, *overrides: str) -> tuple[torch.Tensor, dict[str, float]]:
    """(all weights of final/, the last held-out figures) of a run of its own."""
    launch = ["--accelerate", config] if config else []
    command = [sys.executable, "-m", "rlhf", "train", "recipe.yaml", f"run.name={name}", *overrides, *launch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    run = folder / "runs" / f"{name}-reward"
    weights = load_file(run / "final" / "model.safetensors")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = next(row for row in reversed(rows) if "eval/accuracy" in row)
    return torch.cat([weights[key].flatten() for key in sorted(weights)]), figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and the language model it starts from."""
    place = tmp_path_factory.mktemp("reward")
    start.write(place, RECIPE)
    return place


@pytest.mark.ranks
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="full"),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),  # a minute more for what differs in the merge alone
    ],
)
def test_two_ranks_train_the_reward_model_of_one(overrides: tuple[str, ...], folder: Path) -> None:
    kind = "lora" if overrides else "full"
    weights, figures = trained(folder, f"{kind}-one", None, *overrides)
    for config in ("cpu_2ranks", "cpu_zero3"):
        got, told = trained(folder, f"{kind}-{config}", config, *overrides)
        assert float((got - weights).norm() / weights.norm()) <= 1e-5, config
        for name in ("eval/accuracy", "eval/margin", "eval/calibration_error"):
            assert told[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-5), (config, name)
