"""The loop of objectives on given text (SFT, reward model): a batch, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from rlhf.interfaces import Objective, TokenStats, TrainState
from rlhf.programs import measure
from rlhf.programs.evaluation import Evaluation
from rlhf.programs.session import Session
from rlhf.rollout import TokenBatch
from rlhf.runtime.updater import Term, Updater, UpdateReport


class BatchStream(Protocol):
    def at(self, step: int) -> TokenBatch:
        """This rank's part of a step's batch; a pure function of the step."""


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """Everything the loop calls. evaluate: held-out metrics; batch_metrics: what a step's statistics say; evaluation:
    held-out completions, where the trained model is a policy that rewards can judge."""

    session: Session
    model: nn.Module
    objective: Objective
    updater: Updater
    batches: BatchStream
    steps: int
    eval_every: int
    evaluate: Callable[[nn.Module], dict[str, float]]
    batch_metrics: Callable[[TokenBatch, TokenStats], dict[str, float]]
    evaluation: Evaluation | None = None


def train(run: SupervisedRun, state: TrainState) -> TrainState:
    """Runs the steps that are left; one step is one optimizer step."""
    session = run.session
    if run.evaluation is not None:
        run.evaluation.before(run.model, state)
    for step in range(state.step + 1, run.steps + 1):
        clock = measure.Clock()
        batch = run.batches.at(step).to(session.runtime.device)
        with clock("update"):
            report = run.updater.step([Term(objective=run.objective, batch=batch)], step)
        size = torch.stack([batch.lengths.sum(), batch.lengths.new_tensor(len(batch))])
        tokens, rows = map(int, session.runtime.sum(size).tolist())
        state = state.after(step, updates=1, rows=rows, tokens=tokens)
        session.log(step, {**_metrics(run, batch, report), **clock.metrics(rows, tokens)})
        due = step == run.steps or (run.eval_every and step % run.eval_every == 0)
        if due and (found := run.evaluate(run.model)):
            session.evaluated(step, found)
        if run.evaluation is not None:
            run.evaluation.maybe(run.model, step)
        session.guard.check(step, applied=report.applied)
        session.checkpoint(step, state, run.model, run.updater.optimizer, last=step == run.steps)
    if run.evaluation is not None:
        run.evaluation.after(run.model, state)
    return state


def _metrics(run: SupervisedRun, batch: TokenBatch, report: UpdateReport) -> dict[str, float]:
    return {**measure.update_metrics(report, run.updater.max_grad_norm), **run.batch_metrics(batch, report.stats[0])}
