"""QLoRA on two ranks ends where one process ends; ZeRO-3 is refused before any model loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import needs

from . import start
from .start import apart, trained
from .test_objectives import RECIPE

SETTINGS = ("policy.lora.r=4", "policy.lora.alpha=8", "policy.quantize=4bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    start.write(place, RECIPE.replace("objective: ppo", "objective: reinforce"))
    return place


@needs("bitsandbytes")
@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize("config", ["cpu_2ranks", "cpu_zero2"])
def test_an_adapter_below_four_bits_ends_where_one_process_does(config: str, folder: Path) -> None:
    alone = trained(folder, "alone", "reinforce", *SETTINGS)
    both = trained(folder, f"two-{config}", "reinforce", *SETTINGS, "--accelerate", config)
    assert apart(alone, both) <= 1e-5


@needs("bitsandbytes")
@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything, for a rule that a plan's test asks too
def test_shards_of_quantized_weights_are_refused(folder: Path) -> None:
    command = [sys.executable, "-m", "rlhf", "train", "recipe.yaml", *SETTINGS, "--accelerate", "cpu_zero3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-4000:]
    assert "policy.quantize=4bit: ZeRO-3 and FSDP2 cut weights into shares" in done.stderr
