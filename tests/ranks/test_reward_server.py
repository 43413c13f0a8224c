"""A reward server fails one rank of two: both end alike, and the last whole step is saved by both together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rewards.serving import Answer, made_up, scripted

from . import start

RECIPE = """
objective: reinforce
run: {name: two, seed: 3, steps: 4}
policy: {path: start, compute_dtype: float32}
reward: {models: [{url: "URL"}], missing_eos_score: null}
data: {train: [{path: "rlhf.data.quickstart:demonstrations", max_rows: 32}]}
rollout: {samples_per_prompt: 2, max_new_tokens: 6}
optim: {lr: 1.0e-3}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
checkpoint: {every_steps: null}
tracking: {to: []}
"""


def by_length(body: bytes) -> Answer:
    scores = [len(row["completion"]) / 10 for row in json.loads(body)["rows"]]
    return 200, {}, json.dumps({"scores": scores}).encode()


@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize("config", ["cpu_2ranks", "cpu_zero3"])
def test_both_ranks_end_with_the_code_of_the_one(config: str, tmp_path: Path) -> None:
    """Each step asks four times, once a prompt: the ninth request is the third step's first."""
    broken: Answer = (200, {}, b'{"scores": []}')
    with scripted(made_up(), *[by_length] * 8, broken, by_length) as server:
        start.write(tmp_path, RECIPE.replace("URL", server.url))
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", "train", "recipe.yaml", "--accelerate", config],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 75, done.stderr[-4000:]
    assert len(server.asked) == 12
    run = tmp_path / "runs" / "two-reinforce"
    record = json.loads((run / "run.json").read_text())
    assert record["exit_code"] == 75 and "0 scores for 2 completions" in record["exit_reason"]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-00000002"]
