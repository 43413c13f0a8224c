"""PPO (two models in one engine) and DPO, offline and online, on two ranks end where one process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import start

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
RECIPE = """
objective: ppo
run: {name: one, seed: 3, steps: 2}
policy: {path: start, compute_dtype: float32}
reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}
data: {train: [{path: "rlhf.data.quickstart:preferences", max_rows: 32}]}
rollout: {samples_per_prompt: 2, max_new_tokens: 6}
kl: {beta: 0.1}
ppo: {epochs: 2, minibatches: 1}
optim: {lr: 1.0e-3}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
checkpoint: {every_steps: 1}
tracking: {to: []}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and the language model it starts from."""
    place = tmp_path_factory.mktemp("objectives")
    start.write(place, RECIPE)
    return place


def trained(folder: Path, name: str, objective: str, *more: str) -> torch.Tensor:
    """All trained weights of the last checkpoint, a critic's included."""
    command = [
        sys.executable,
        "-m",
        "rlhf",
        "train",
        "recipe.yaml",
        f"run.name={name}",
        f"objective={objective}",
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return weights(folder, name, objective)


def weights(folder: Path, name: str, objective: str) -> torch.Tensor:
    """All trained weights of a run's last checkpoint, a critic's included."""
    last = sorted((folder / "runs" / f"{name}-{objective}" / "checkpoints").iterdir())[-1]
    found = load_file(last / "model.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found)])


@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything, for what the layouts' own tests prove of the gradient
@pytest.mark.parametrize(
    ("objective", "settings", "config"),
    [
        ("ppo", (), "cpu_2ranks"),
        ("ppo", (), "cpu_zero3"),
        ("dpo", (), "cpu_zero2"),
        ("dpo", ("dpo.online=true",), "cpu_2ranks"),
        ("grpo", (), "cpu_2ranks"),
        ("reinforce_plus_plus", (), "cpu_2ranks"),
        ("ppo", ("value.shared=true", "ppo.whiten_rewards=true", "ppo.stop_kl=1.0"), "cpu_zero2"),
        ("simpo", (), "cpu_2ranks"),
        ("reinforce", ("optim.kl_step_limit=1e-4", "reference.ema=0.5"), "cpu_2ranks"),
        ("trpo", ("trpo.iterations=3", "policy.compute_dtype=float32"), "cpu_2ranks"),
    ],
)
def test_two_ranks_end_where_one_does(objective: str, settings: tuple[str, ...], config: str, folder: Path) -> None:
    alone = trained(folder, f"one-{config}", objective, *settings)
    both = trained(folder, f"two-{config}", objective, *settings, "--accelerate", config)
    assert float((both - alone).norm() / alone.norm()) <= 1e-5


@pytest.mark.ranks
@pytest.mark.slow  # stage 2 with gradients that stay whole
def test_zero1_ends_where_one_process_does(folder: Path) -> None:
    text = (CONFIGS / "cpu_zero2.yaml").read_text(encoding="utf-8")
    assert "zero_stage: 2" in text
    (folder / "zero1.yaml").write_text(text.replace("zero_stage: 2", "zero_stage: 1"), encoding="utf-8")
    alone = trained(folder, "one-zero1", "ppo")
    both = trained(folder, "two-zero1", "ppo", "--accelerate", "zero1.yaml")
    assert float((both - alone).norm() / alone.norm()) <= 1e-5
