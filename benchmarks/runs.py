"""Training runs as benchmarks need them: named by what was asked for, kept in a record, never made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import record
from judge import Judge

from rlhf.programs.outcome import Outcome, outcome

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. steps × prompts × 4 completions (pairs of as many prompts, offline). A record with other overrides is
    another run; one of another commit is not, so that a comparison can go on after a change elsewhere."""

    method: str
    overrides: tuple[str, ...]
    lr: float
    beta: float
    seed: int
    steps: int
    prompts: int
    recipe: str = "quickstart"

    @property
    def name(self) -> str:
        place = "" if self.recipe == "quickstart" else f"{self.recipe}-"
        return f"{place}{self.method}-b{self.beta:g}-lr{self.lr:g}-s{self.seed}-{self.steps}x{self.prompts}"

    @property
    def settings(self) -> list[str]:
        """What the run is told. It evaluates before and after, with one stream of noise, and at no other time."""
        said = [f"kl.beta={self.beta!r}", f"optim.lr={self.lr!r}", f"run.seed={self.seed}"]
        sizes = [f"run.steps={self.steps}", f"batch.prompts_per_step={self.prompts}"]
        return [*self.overrides, *said, *sizes, *evaluated(self.name)]


def evaluated(name: str) -> list[str]:
    names = [f"run.name={name}", "run.output_dir=runs/{name}"]
    return [*names, "eval.samples=128", "eval.every_steps=null", "checkpoint.keep=1"]


@dataclass
class Bench:
    """Where runs happen, and what is known already. rows: a folder with the reviews' train.jsonl and test.jsonl."""

    folder: Path
    path: Path
    rows: Path | None = None
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path, path: Path, rows: Path | None = None) -> Bench:
        """The record at ``path`` goes on; one that is not there is begun."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known = {row["run"]: row for row in map(json.loads, lines)}
        return cls(folder.resolve(), path.resolve(), rows.resolve() if rows else None, known)

    def row(self, job: Job) -> dict[str, Any]:
        """The figures of a run, from the record or by running it."""
        known = self.known.get(job.name)
        if known is None or known["overrides"] != list(job.overrides):
            found = {"run": job.name, "overrides": list(job.overrides), **self._run(job), "commit": record.commit()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            self.known[job.name] = found
            print(found, flush=True)
        return self.known[job.name]

    def models(self, recipe: str) -> None:
        """The recipe's SFT model and reward model; what is finished is left alone."""
        for stage in ("sft", "reward"):
            if not (self.folder / "runs" / f"{recipe}-{stage}" / "final").is_dir():
                self.train(f"{recipe}/{stage}")

    def train(self, recipe: str, *overrides: str) -> tuple[float, int]:
        data: list[str] = []
        if recipe.startswith("reviews/") and self.rows is not None:
            data = [f"data.train.0.path={self.rows / 'train.jsonl'}", f"data.eval.0.path={self.rows / 'test.jsonl'}"]
        return self.command([sys.executable, "-m", "rlhf", "train", recipe, *data, *overrides])

    def _run(self, job: Job) -> dict[str, Any]:
        self.models(job.recipe)
        theirs = job.method.startswith("trl_")
        if theirs:
            seconds, peak = self._trl(job)
            run = self._judged(job)
        else:
            seconds, peak = self.train(f"{job.recipe}/reinforce", *job.settings)
            run = self.folder / "runs" / job.name
        found = outcome(run)
        assert found is not None
        return {
            "method": job.method,
            "beta": job.beta,
            "lr": job.lr,
            "seed": job.seed,
            "completions": job.steps * job.prompts * 4,
            **self._figures(job, found, side=0 if theirs else 1),
            "seconds": round(seconds, 1),
            "step_seconds": round(self._step_seconds(job), 1),
            "peak_mib": round(peak / 2**20),
        }

    def _figures(self, job: Job, found: Outcome, side: int) -> dict[str, float | None]:
        """side 1: after training. TRL's policy is the one that its judging run starts from: side 0, and no before."""
        value = {name: (change.before, change.after) for name, change in found.changes.items()}
        judged = "gold" if job.recipe == "quickstart" else "positive"
        if judged == "positive":
            value["positive"] = self.judge.positive_share(_whole(found, 0)), self.judge.positive_share(_whole(found, 1))
        figures = {name: round(value[name][side], 4) for name in (judged, "reward", "kl", "tokens")}
        return {**figures, f"{judged}_before": round(value[judged][0], 4) if side else None}

    @cached_property
    def judge(self) -> Judge:
        """Of the reviews."""
        if self.rows is None:
            raise SystemExit("the reviews need --rows")
        return Judge.trained(self.rows / "train.jsonl")

    def _step_seconds(self, job: Job) -> float:
        """Of training alone: no start, no evaluation, no checkpoint."""
        if job.method.startswith("trl_"):
            return float((self.folder / "trl" / job.name / "seconds.txt").read_text())
        lines = (self.folder / "runs" / job.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return float(sum(json.loads(line).get("time/step_seconds", 0.0) for line in lines))

    def _trl(self, job: Job) -> tuple[float, int]:
        """TRL's trainer in a process of its own; its policy is left in ``trl/NAME``."""
        script = str(ROOT / "benchmarks" / "trl_trainers.py")
        sizes = ["--steps", str(job.steps), "--prompts", str(job.prompts), "--out", f"trl/{job.name}"]
        chosen = ["--lr", repr(job.lr), "--beta", repr(job.beta), "--seed", str(job.seed)]
        return self.command([sys.executable, script, job.method.removeprefix("trl_"), *sizes, *chosen])

    def _judged(self, job: Job) -> Path:
        """A run of ours that starts from TRL's policy: its evaluation before the first step is what is wanted."""
        name = f"{job.name}-judged"
        models = [f"policy.path=trl/{job.name}", "reference.path=runs/quickstart-sft/final"]
        least = ["run.steps=1", "batch.prompts_per_step=1", "rollout.samples_per_prompt=2", f"run.seed={job.seed}"]
        self.train("quickstart/reinforce", *models, *least, *evaluated(name))
        return self.folder / "runs" / name

    def command(self, command: list[str]) -> tuple[float, int]:
        """(wall seconds, peak bytes of the process) of a command in the folder; its output goes to a file."""
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
        started = time.monotonic()
        with (self.folder / "log.txt").open("a") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed; see {self.folder / 'log.txt'}")
        return time.monotonic() - started, used.ru_maxrss * 1024


def _whole(found: Outcome, side: int) -> list[str]:
    samples: list[Mapping[str, Any]] = [pair[side] for pair in found.pairs]
    return [sample["prompt"] + sample["completion"] for sample in samples]
