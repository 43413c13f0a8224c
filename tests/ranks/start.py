"""What rank tests of whole runs start from, how they start them, and what they compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf.data import quickstart
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"


def write(place: Path, recipe: str) -> None:
    """``recipe.yaml`` and ``start/``: a Gemma of one layer with its tokenizer."""
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    texts = [turn["content"] for row in quickstart.demonstrations()[:200] for turn in row["messages"]]
    tokenizer = train_tokenizer(texts, 512)
    config = build_config("gemma", layers=1, hidden_size=32, heads=2, vocab_size=len(tokenizer))
    build_causal_lm(config, seed=3).save_pretrained(place / "start")
    tokenizer.save_pretrained(place / "start")


def trained(folder: Path, name: str, objective: str, *more: str) -> torch.Tensor:
    """All trained weights of the last checkpoint of a run by ``rlhf train``, which may be given ``--accelerate``."""
    command = ["-m", "rlhf", "train", "recipe.yaml", f"run.name={name}", f"objective={objective}", *more]
    run(folder, [sys.executable, *command])
    return weights(folder, name, objective)


def train_several(folder: Path, config: Path | None, runs: Sequence[Sequence[str]]) -> None:
    """Runs with these overrides one after the other, in one launch. config: of accelerate; None = one process."""
    script = str(ROOT / "tests" / "ranks" / "several.py")
    run(folder, [*launched(config), script, json.dumps([list(each) for each in runs])])


def launched(config: Path | None) -> list[str]:
    """What stands before a script that accelerate starts in several processes; None = Python alone, in one."""
    if config is None:
        return [sys.executable]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, "--main_process_port", "0"]


def weights(folder: Path, name: str, objective: str) -> torch.Tensor:
    """All trained weights of a run's last checkpoint, a critic's included."""
    last = sorted((folder / "runs" / f"{name}-{objective}" / "checkpoints").iterdir())[-1]
    found = load_file(last / "model.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found)])


def rewards(run: Path) -> list[float]:
    """Mean score of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["reward/score_mean"] for row in rows if "reward/score_mean" in row]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖Δ‖/‖w‖."""
    return float((other - one).norm() / one.norm())


def run(folder: Path, command: Sequence[str], **environment: str) -> None:
    """In ``folder``; fails with the end of what it said."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
