"""One rank of plan.py's measurement: two steps of a recipe, the second one watched.

    python benchmarks/plan_side.py FOLDER

FOLDER as `plan_cases.make` leaves it. The first rank writes `measured.json`: bytes of CPU tensors held at the beginning
of the second step, and at its peak, as a whole and in each part.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tensor_bytes
import torch
from torch.profiler import record_function

from rlhf import assemble
from rlhf.interfaces import TrainState
from rlhf.programs.session import Session
from rlhf.recipe import load_recipe
from rlhf.runtime import distributed


class Watched(Exception):
    """The watched step has ended."""


class Silent:
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass
class Named:
    """An object, some of whose methods are parts of the step."""

    inner: Any
    parts: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        return _part(self.parts[name], value) if name in self.parts else value


def _part(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        with record_function(f"part:{name}"):
            return call(*arguments, **named)

    return run


@dataclass
class Prompts:
    """The stream of prompts; asked for the second step's it begins to watch, asked for the third's it ends the run."""

    inner: Any
    folder: Path
    main: bool
    watching: ExitStack = field(default_factory=ExitStack)
    before: int = 0
    peak: tensor_bytes.Peak | None = None

    def at(self, step: int) -> Any:
        if step == 2:
            self.before = tensor_bytes.held()
            self.peak = self.watching.enter_context(tensor_bytes.peak())
        if step == 3:
            self.end()
        return self.inner.at(step)

    def end(self) -> None:
        assert self.peak is not None
        self.watching.close()
        parts = {name: self.before + size for name, size in self.peak.within.items()}
        found = {"held": self.before, "peak": self.before + self.peak.bytes, "parts": parts}
        if self.main:
            (self.folder / "measured.json").write_text(json.dumps(found), encoding="utf-8")
        raise Watched


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(str(folder / "recipe.yaml"), ["run.steps=3"])
    dtype = distributed.auto_dtype(recipe.policy.compute_dtype)
    runtime = distributed.start(max_grad_norm=recipe.optim.max_grad_norm, compute_dtype=dtype)
    session = Session(runtime=runtime, tracker=Silent(), root=folder / "checkpoints", every_steps=0, keep=1)
    job = assemble.build(recipe, session)
    train: Any = job.train
    (run,) = train.args
    run = replace(
        run,
        prompts=Prompts(run.prompts, folder, runtime.main),
        sampler=Named(run.sampler, {"sample": "generation"}),
        rewards=Named(run.rewards, {"score": "scoring"}),
        reference=Named(run.reference, {"stats": "reference"}),
        updater=Named(run.updater, {"step": "update"}),
    )
    try:
        train.func(run, TrainState())
    except Watched:
        runtime.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
