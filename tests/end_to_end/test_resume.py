"""kill -9 anywhere, start again: the final weights are those of the run that was never killed, to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
objective: reinforce
run: {name: kill, seed: 7, steps: 8}
policy: {scratch: {family: gemma, layers: 1, hidden_size: 32, heads: 2, vocab_size: 512}, compute_dtype: float32}
reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}
data:
  train: [{path: "rlhf.data.quickstart:preferences", max_rows: 64}]
  eval: [{path: "rlhf.data.quickstart:heldout_prompts", max_rows: 4}]
rollout: {samples_per_prompt: 2, max_new_tokens: 8}
kl: {beta: 0.1}
reinforce: {baseline: moving_average}
optim: {lr: 1.0e-3}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
eval: {every_steps: null}
checkpoint: {every_steps: 1, keep: 2}
tracking: {to: []}
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A fresh process; its output goes to a file so that nothing blocks on a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rlhf", "train", "recipe.yaml"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def folder_with_recipe(path: Path, steps: int, objective: str) -> Path:
    path.mkdir()
    text = RECIPE.replace("steps: 8", f"steps: {steps}").replace("objective: reinforce", f"objective: {objective}")
    if objective == "reward":
        text = text.replace("heldout_prompts", "preferences")
    (path / "recipe.yaml").write_text(text, encoding="utf-8")
    return path


def run_of(folder: Path) -> Path:
    """The only run directory, or where it will be."""
    return next(iter((folder / "runs").glob("kill-*")), folder / "runs" / "none")


def final(folder: Path) -> tuple[str, list[tuple[int, float]]]:
    """Hash of the final weights, and (step, loss) of every training step in the metrics."""
    run = run_of(folder)
    assert json.loads((run / "run.json").read_text())["status"] == "finished", (folder / "log").read_text()[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row[name]) for row in rows for name in ("policy/loss", "loss/reward") if name in row]
    assert losses and [step for step, _ in losses] == list(range(1, len(losses) + 1))
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest(), losses


def logged(folder: Path) -> int:
    """Lines of the metrics so far: about one a step."""
    file = run_of(folder) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends by itself within that time."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def killed(folder: Path, kills: int, steps: int, draw: random.Random) -> int:
    """Kills the run ``kills`` times at random moments, then lets it finish. Returns how many kills hit it alive.

    A life ends in its start, or some steps on at a random moment of a step; ten of them do not finish the run.
    """
    hits = 0
    for _ in range(kills):
        process = start(folder)
        in_its_start = draw.random() < 0.3
        deadline = time.monotonic() + (draw.uniform(0.3, 3.0) if in_its_start else 120.0)
        target = logged(folder) + draw.randint(0, steps // (kills + 2))
        while logged(folder) <= target and time.monotonic() < deadline and not ended(process, 0.02):
            pass
        if not ended(process, draw.uniform(0.0, 0.05)):
            process.kill()
            process.wait()
            hits += 1
    assert start(folder).wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]
    return hits


def _compare(tmp_path: Path, kills: int, seed: int, steps: int, objective: str = "reinforce") -> int:
    whole = folder_with_recipe(tmp_path / "whole", steps, objective)
    assert start(whole).wait(timeout=300) == 0, (whole / "log").read_text()[-3000:]
    broken = folder_with_recipe(tmp_path / "broken", steps, objective)
    hits = killed(broken, kills, steps, random.Random(seed))
    assert final(broken) == final(whole)
    return hits


def test_two_kills_change_nothing(tmp_path: Path) -> None:
    assert _compare(tmp_path, kills=2, seed=1, steps=8) == 2


def test_a_reward_model_survives_a_kill(tmp_path: Path) -> None:
    assert _compare(tmp_path, kills=1, seed=3, steps=10, objective="reward") == 1


@pytest.mark.slow  # minutes: twelve starts of a process that imports torch and transformers
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    assert _compare(tmp_path, kills=10, seed=2, steps=60) == 10
