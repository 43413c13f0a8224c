"""One side of compare_trl.py: a process that takes a step whenever it is told to.

    python benchmarks/trl_sides.py ours|trl FOLDER

FOLDER as `trl_workloads.make` leaves it. Reads a word a line from its input: `step`, `memory` (a step whose allocations
are watched) or `flops` (one whose matrix products are counted). Answers each with a line of JSON: seconds by phase,
completion tokens, a hash of every completion, peak bytes, floating-point operations.

Both draw the same tokens: TRL's side has `torch.multinomial` drawn as always, puts our draw in its place, and takes the
time of ours off the clock. Rates are so low that weights keep their values from step to step.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false"
)

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import tensor_bytes
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl_workloads import Workload

from rlhf.assemble import policy as assembling
from rlhf.interfaces import TrainState
from rlhf.programs import policy as program
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.rollout import Prompt, Rollout
from rlhf.runtime import distributed
from rlhf.sampling.noise import Workspace, position_keys, row_keys, sample_tokens

SEED, LR, BETA = 0, 1e-9, 0.05


@dataclass
class Gate:
    """Where a side stops between its steps, and what it says of the one it has taken."""

    answers: Any = field(default_factory=lambda: os.fdopen(os.dup(1), "w", buffering=1))
    phases: dict[str, float] = field(default_factory=dict)
    rows: list[list[int]] = field(default_factory=list)
    off_the_clock: float = 0.0
    started: float | None = None
    watched: ExitStack = field(default_factory=ExitStack)
    peak: tensor_bytes.Peak | None = None
    flops: FlopCounterMode | None = None

    def between_steps(self) -> None:
        """Answers for the step that ended here, if one did, and waits for the word to take the next."""
        if self.started is not None:
            seconds = time.perf_counter() - self.started - self.off_the_clock
            self.watched.close()
            found = {
                "seconds": seconds,
                "phases": self.phases,
                "tokens": sum(map(len, self.rows)),
                "rows": [hashlib.sha256(repr(row).encode()).hexdigest()[:8] for row in self.rows],
                "peak_bytes": self.peak.bytes if self.peak is not None else None,
                "flops": self.flops.get_total_flops() if self.flops is not None else None,
            }
            self.answers.write(json.dumps(found) + "\n")
        word = sys.stdin.readline().strip()
        if not word:
            sys.exit(0)
        self.phases, self.rows, self.off_the_clock = {}, [], 0.0
        self.peak = self.flops = None
        if word == "memory":
            self.peak = self.watched.enter_context(tensor_bytes.peak())
        if word == "flops":
            self.flops = self.watched.enter_context(FlopCounterMode(display=False))
        self.started = time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started, before = time.perf_counter(), self.off_the_clock
            found = call(*arguments, **named)
            passed = time.perf_counter() - started - (self.off_the_clock - before)
            self.phases[name] = self.phases.get(name, 0.0) + passed
            return found

        return run


# --- ours ------------------------------------------------------------------------------------------------------------


@dataclass
class Quiet:
    """A tracker: the loop makes its metrics, and they go no further than the gate."""

    gate: Gate

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        start, end = "time/", "_seconds"
        found = {name: value for name, value in metrics.items() if name.startswith(start) and name.endswith(end)}
        self.gate.phases = {name.removeprefix(start).removesuffix(end): value for name, value in found.items()}

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


@dataclass(frozen=True)
class InOrder:
    """The file's prompts, a step after the other: TRL's without its shuffling."""

    gate: Gate
    prompts: Sequence[Prompt]
    per_step: int

    def at(self, step: int) -> tuple[Sequence[Prompt], Sequence[int]]:
        self.gate.between_steps()
        first = (step - 1) * self.per_step
        return self.prompts[first : first + self.per_step], range(self.per_step)


@dataclass(frozen=True)
class Noted:
    """Tells the gate what was sampled."""

    gate: Gate
    sampler: Any

    def sample(self, *arguments: Any) -> Rollout:
        rollout: Rollout = self.sampler.sample(*arguments)
        lengths = rollout.completion_mask.sum(1).tolist()
        self.gate.rows = [row[:n] for row, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]
        return rollout


def ours(folder: Path, work: Workload, gate: Gate) -> NoReturn:
    """The loop of `rlhf train`, as it is assembled from a recipe; only the prompts come in the file's order."""
    recipe = Recipe.model_validate(
        {
            "objective": "rloo",
            "run": {"name": "compare", "seed": SEED, "steps": 10**6, "output_dir": str(folder / "run")},
            "policy": {"path": str(folder / "policy"), "compute_dtype": work.dtype},
            "reward": {"models": [{"path": str(folder / "reward")}], "missing_eos_score": None},
            "data": {"train": [{"path": str(folder / "prompts.jsonl")}], "max_prompt_tokens": 1024},
            "rollout": {"samples_per_prompt": work.k, "max_new_tokens": work.new, "kv_cache_gib": work.kv_cache_gib},
            "kl": {"beta": BETA},
            "optim": {"lr": LR, "schedule": "constant", "warmup_ratio": 0.0},
            "batch": {"prompts_per_step": work.prompts, "microbatch_tokens": work.microbatch_tokens},
            "eval": {"every_steps": None},
            "tracking": {"to": []},
        }
    )
    runtime = distributed.start(max_grad_norm=1.0, compute_dtype=distributed.auto_dtype(work.dtype))
    session = Session(runtime=runtime, tracker=Quiet(gate), root=folder / "checkpoints", every_steps=0, keep=1)
    (run,) = assembling.build(recipe, session).train.args  # type: ignore[attr-defined]
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt(row_id=at, text=row["prompt"]) for at, row in enumerate(rows)]
    state = TrainState()
    program.train(replace(run, prompts=InOrder(gate, prompts, work.prompts), sampler=Noted(gate, run.sampler)), state)
    sys.exit(0)


# --- TRL -------------------------------------------------------------------------------------------------------------


@dataclass
class OurDraws:
    """Takes `torch.multinomial`'s place: the token that our sampler draws at this step, row and position."""

    gate: Gate
    work: Workload
    draw: Callable[..., torch.Tensor] = torch.multinomial
    step: int = 0
    position: int = 0
    space: Workspace | None = None

    def begin(self) -> None:
        self.step, self.position = self.step + 1, 0

    def __call__(self, probabilities: torch.Tensor, num_samples: int, **named: Any) -> torch.Tensor:
        self.draw(probabilities, num_samples, **named)
        started = time.perf_counter()
        slots = torch.arange(self.work.prompts).repeat_interleave(self.work.k)
        samples = torch.arange(self.work.k).repeat(self.work.prompts)
        keys = position_keys(row_keys(SEED, self.step, slots, samples), self.position)
        self.space = self.space or Workspace.like(probabilities)
        tokens, _ = sample_tokens(probabilities.log(), 1.0, keys, self.space)
        self.position += 1
        self.gate.off_the_clock += time.perf_counter() - started
        return tokens[:, None]


def trl(folder: Path, work: Workload, gate: Gate) -> NoReturn:
    """RLOOTrainer as its documentation has it: models by path, defaults where they do the same as ours."""
    import transformers
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    draws = OurDraws(gate, work)

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.between_steps()
            draws.begin()

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    trainer: Any = RLOOTrainer(
        model=str(folder / "policy"),
        reward_funcs=str(folder / "reward"),
        args=RLOOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=work.prompts * work.k,
            num_generations=work.k,
            max_completion_length=work.new,
            max_steps=10**6,
            beta=BETA,
            learning_rate=LR,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            top_k=0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            bf16=work.dtype == "bfloat16",
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=SEED,
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Steps()],
    )
    generate = trainer._generate_single_turn

    def noted(*arguments: Any, **named: Any) -> Any:
        torch.multinomial = draws  # type: ignore[assignment]
        found = generate(*arguments, **named)
        torch.multinomial = draws.draw
        gate.rows = found
        return found

    trainer._generate_single_turn = gate.timed("sample", noted)
    trainer._calculate_rewards = gate.timed("score", trainer._calculate_rewards)
    logprobs = trainer._get_per_token_logps_and_entropies
    reference_pass = gate.timed("reference", logprobs)
    old_pass = gate.timed("old log-probabilities", logprobs)

    def which(model: Any, *arguments: Any, **named: Any) -> Any:
        if named.get("compute_entropy"):  # the update's own
            return logprobs(model, *arguments, **named)
        return (reference_pass if model is trainer.ref_model else old_pass)(model, *arguments, **named)

    trainer._get_per_token_logps_and_entropies = which
    trainer.train()
    sys.exit(0)


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    gate = Gate()
    os.dup2(2, 1)  # what libraries print belongs to the log, not between the answers
    warnings.simplefilter("ignore")  # TRL and transformers about each other's old names
    torch.set_num_threads(1)
    work = Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))
    {"ours": ours, "trl": trl}[side](folder, work, gate)


if __name__ == "__main__":
    main()
