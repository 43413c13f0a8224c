"""One process, two DDP ranks, ZeRO-2, ZeRO-3 and FSDP2 on two CPU ranks take the same step on the same global batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from . import start

CONFIGS = {"single": None, "ddp": "cpu_2ranks", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "cpu_fsdp2"}
ESTIMATORS = ("k1", "exact")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind of ``CONFIGS`` → what its processes wrote, a folder an estimator."""

    @cache
    def folder(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind)
        for estimator in ESTIMATORS:
            (out / estimator).mkdir()
        compiled, config = out / "compiled", CONFIGS[kind]
        command = start.launched(None if config is None else start.CONFIGS / f"{config}.yaml")
        script = str(start.ROOT / "tests" / "ranks" / "worker.py")
        start.run(out, [*command, script, str(out), *ESTIMATORS], TORCH_EXTENSIONS_DIR=str(compiled))
        assert not compiled.exists()  # a compilation that is killed leaves a lock at which later starts would hang
        return out

    return folder


def vector(path: Path, suffix: str = "") -> Tensor:
    """All tensors of a file whose name ends in ``suffix`` (weights: those that are no optimizer state)."""
    tensors = load_file(path)
    state = (".exp_avg", ".exp_avg_sq")
    names = [n for n in sorted(tensors) if (n.endswith(suffix) if suffix else not n.endswith(state)) and n != "step"]
    return torch.cat([tensors[name].flatten() for name in names])


@pytest.mark.ranks
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_ranks_take_the_step_of_one(kind: str, estimator: str, ran: Callable[[str], Path]) -> None:
    alone, got = ran("single") / estimator, ran(kind) / estimator
    assert (got / "kind").read_text() == f"{kind} 2"
    one, two = load_file(alone / "facts.safetensors"), load_file(got / "facts.safetensors")
    assert torch.equal(one["lr"], two["lr"])
    assert bool((two["microbatches"] == 2).all())  # rank 0 needs one of its own; the other is a filler
    # after one step Adam's first moment is (1 − β₁) times the clipped gradient: the gradient itself, every layout
    gradient = vector(alone / "step1.safetensors", ".exp_avg")
    assert start.apart(gradient, vector(got / "step1.safetensors", ".exp_avg")) <= 1e-6
    assert start.apart(vector(alone / "step5.safetensors"), vector(got / "step5.safetensors")) <= 1e-5
    torch.testing.assert_close(two["norm"], one["norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=0, atol=1e-5)
    assert (got / "resumed").read_text() == "same" == (alone / "resumed").read_text()
