"""Two launches with a process each, as on two machines, meet and end where one process ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from . import start
from .start import apart, trained, weights
from .test_objectives import RECIPE


def launch(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    where = ["--machine_rank", str(rank), "--main_process_port", str(port)]
    program = ["-m", "rlhf", "train", "recipe.yaml", "run.name=nodes", "objective=rloo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, *where, *program],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


CONFIG = start.CONFIGS / "cpu_2nodes.yaml"


@pytest.mark.ranks
@pytest.mark.slow  # two launchers, for what differs from one: who opens the run directory, and who is rank 0
def test_two_machines_train_as_one(tmp_path: Path) -> None:
    start.write(tmp_path, RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [launch(tmp_path, rank, port) for rank in (0, 1)]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said[-4000:]
    alone, both = trained(tmp_path, "alone", "rloo"), weights(tmp_path, "nodes", "rloo")
    assert apart(alone, both) <= 1e-5
