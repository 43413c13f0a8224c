"""One process, two DDP ranks, ZeRO-2, ZeRO-3 and FSDP2 on two CPU ranks take the same step on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"ddp": "cpu_2ranks", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "cpu_fsdp2"}


def run(out: Path, config: str | None, estimator: str) -> Path:
    out.mkdir(parents=True)
    launcher = [sys.executable]
    if config is not None:
        path = ROOT / "accelerate_configs" / f"{config}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
        launcher += ["--main_process_port", "0"]
    command = [*launcher, str(ROOT / "tests" / "ranks" / "worker.py"), str(out), estimator]
    compiled = out.parent / "compiled"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(compiled),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not compiled.exists()  # a compilation that is killed leaves a lock at which later starts would hang
    return out


@pytest.fixture(scope="module", params=["k1", "exact"])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(tmp_path_factory.mktemp("single") / "out", None, request.param), request.param


def vector(path: Path, suffix: str = "") -> Tensor:
    """All tensors of a file whose name ends in ``suffix`` (weights: those that are no optimizer state)."""
    tensors = load_file(path)
    state = (".exp_avg", ".exp_avg_sq")
    names = [n for n in sorted(tensors) if (n.endswith(suffix) if suffix else not n.endswith(state)) and n != "step"]
    return torch.cat([tensors[name].flatten() for name in names])


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_ranks_take_the_step_of_one(kind: str, single: tuple[Path, str], tmp_path: Path) -> None:
    alone, estimator = single
    got = run(tmp_path / "out", CONFIGS[kind], estimator)
    assert (got / "kind").read_text() == f"{kind} 2"
    one, two = load_file(alone / "facts.safetensors"), load_file(got / "facts.safetensors")
    assert torch.equal(one["lr"], two["lr"])
    assert bool((two["microbatches"] == 2).all())  # rank 0 needs one of its own; the other is a filler
    # after one step Adam's first moment is (1 − β₁) times the clipped gradient: the gradient itself, every layout
    gradient = vector(alone / "step1.safetensors", ".exp_avg")
    drift = vector(got / "step1.safetensors", ".exp_avg") - gradient
    assert float(drift.norm() / gradient.norm()) <= 1e-6
    weights = vector(alone / "step5.safetensors")
    assert float((vector(got / "step5.safetensors") - weights).norm() / weights.norm()) <= 1e-5
    torch.testing.assert_close(two["norm"], one["norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=0, atol=1e-5)
    assert (got / "resumed").read_text() == "same" == (alone / "resumed").read_text()
