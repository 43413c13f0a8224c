"""The policy loop: sample, score, compare with the reference, update. It reads like the algorithm box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from rlhf.interfaces import PolicyObjective, Sampler, StatsRequest, TokenStats, TrainState
from rlhf.models.layout import plain_rows
from rlhf.models.policy import token_stats
from rlhf.models.reference import Reference
from rlhf.programs import measure, passes
from rlhf.programs.evaluation import Evaluation, sample_rows
from rlhf.programs.session import Session
from rlhf.rewards.combine import RewardSet
from rlhf.rollout import Prompt, Rollout, TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import unwrap
from rlhf.runtime.updater import Term, Updater


class PromptStream(Protocol):
    def at(self, step: int) -> tuple[Sequence[Prompt], Sequence[int]]:
        """This rank's prompts of a step and their slots in the step's global prompt list."""


class InstructionStream(Protocol):
    def at(self, step: int) -> Term:
        """This rank's gold completions of a step, as a term of the loss."""

    def metrics(self, batch: TokenBatch, stats: TokenStats) -> dict[str, float]:
        """What the update's forward says of them."""


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """Everything the loop calls. Built by ``assemble``; every field can be replaced without touching the loop."""

    session: Session
    model: nn.Module
    sampler: Sampler
    rewards: RewardSet
    reference: Reference
    objective: PolicyObjective
    beta: float
    updater: Updater
    prompts: PromptStream
    instruction: InstructionStream | None
    evaluation: Evaluation
    steps: int
    samples_logged: int


def train(run: PolicyRun, state: TrainState) -> TrainState:
    """Runs the steps that are left. A step is one rollout and its update."""
    session, runtime = run.session, run.session.runtime
    run.evaluation.before(run.model, state)
    for step in range(state.step + 1, run.steps + 1):
        clock = measure.Clock()
        prompts, slots = run.prompts.at(step)
        with clock("sample"):
            rollout = run.sampler.sample(causal_lm(run.model), prompts, slots, step)  # y ~ π(·|x), k per prompt
        with clock("score"):
            rollout = run.rewards.score(rollout, step)  # r(x, y)
        with clock("reference"):
            rollout = fill_needs(run, rollout, prompts, slots, step)  # log π_ref, and what else the objective asks for
        rollout, state = run.objective.prepare(rollout, state, runtime)  # baselines, advantages
        with clock("update"):
            updates = update(run, rollout, step, state.optimizer_step)  # one step, or the passes of the objective
        completions, tokens = measure.totals(rollout, runtime)
        state = state.after(step, updates=len(updates), rows=completions, tokens=tokens)
        stats = passes.on_policy_stats(rollout, updates)
        session.log(step, {**metrics(run, rollout, stats, updates, step), **clock.metrics(completions, tokens)})
        session.samples(step, partial(sample_rows, rollout, stats, run.samples_logged, run.rewards.extras()))
        run.evaluation.maybe(run.model, step)
        session.guard.check(step, applied=all(each.report.applied for each in updates))
        session.checkpoint(step, state, run.model, run.updater.optimizer, last=step == run.steps)
    run.evaluation.after(run.model, state)
    return state


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside wrapper and ``ScoredModel``: what decodes."""
    inner: nn.Module = unwrap(model).causal_lm  # type: ignore[assignment]
    return inner


def update(run: PolicyRun, rollout: Rollout, step: int, done: int) -> list[passes.Update]:
    """The optimizer steps of one rollout; ``done`` of the run were taken before."""
    parts = enumerate(passes.parts(rollout, passes.passes_of(run.objective), step), start=done + 1)
    return [passes.Update(part, run.updater.step(terms(run, part, step), number)) for number, part in parts]


def terms(run: PolicyRun, rollout: Rollout, step: int) -> list[Term]:
    """The summands of the step's loss: the rollout, and the instruction data where it is mixed in."""
    mixed = [] if run.instruction is None else [run.instruction.at(step)]
    return [Term(objective=run.objective, batch=rollout), *mixed]


def fill_needs(run: PolicyRun, rollout: Rollout, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
    """The quantities the objective asks for, each by one pass."""
    needs, temperature = run.objective.needs, run.objective.request.temperature
    if "reference" in needs:
        request = StatsRequest(temperature=temperature)
        found = scored(run, rollout, lambda batch: run.reference.stats(plain_rows(batch), request))
        rollout = replace(rollout, ref_logprobs=found.logprobs)
    if needs & {"old_logprobs", "score_norms", "values"}:
        request = StatsRequest(temperature=temperature, score_norms="score_norms" in needs, values="values" in needs)
        found = scored(run, rollout, lambda batch: token_stats(run.model, plain_rows(batch), request))
        rollout = replace(rollout, old_logprobs=found.logprobs, score_norms=found.score_norms, values=found.values)
    if "greedy" in needs:
        best = run.rewards.score(run.sampler.greedy(causal_lm(run.model), prompts, slots, step), step)
        assert best.rewards is not None
        rewards = dict(zip(best.group.tolist(), best.rewards.tolist(), strict=True))
        per_row = torch.tensor([rewards[group] for group in rollout.group.tolist()], device=rollout.group.device)
        rollout = replace(rollout, greedy_rewards=per_row)  # NaN where unscorable: maths.baselines.greedy fills those
    return rollout


def scored(run: PolicyRun, batch: TokenBatch, forward: Callable[[TokenBatch], TokenStats]) -> TokenStats:
    """Statistics of the whole batch without gradient, in the update's own microbatches."""
    return microbatches.score(batch, forward, run.updater.microbatch_tokens, run.session.runtime)


def metrics(
    run: PolicyRun, rollout: Rollout, stats: TokenStats, updates: Sequence[passes.Update], step: int
) -> dict[str, float]:
    mixed, runtime = updates[0].report.stats[1:], run.session.runtime
    kept = run.instruction.metrics(run.instruction.at(step).batch, *mixed) if run.instruction is not None else {}
    return {
        **measure.rollout_metrics(rollout, stats, run.beta, runtime),
        **kept,
        **passes.metrics(updates, passes.passes_of(run.objective), run.updater.max_grad_norm, runtime),
        **run.rewards.metrics(rollout, runtime),
    }
