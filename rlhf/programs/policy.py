"""The policy loop: sample, score, compare with the reference, update. It reads like the algorithm box."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rlhf.interfaces import TokenStats, TrainState
from rlhf.programs import measure, needs, passes
from rlhf.programs.evaluation import sample_rows
from rlhf.programs.policy_run import PolicyRun, causal_lm
from rlhf.rollout import Rollout
from rlhf.runtime.updater import Term

__all__ = ["PolicyRun", "train"]


def train(run: PolicyRun, state: TrainState) -> TrainState:
    """Runs the steps that are left. A step is one rollout and its update."""
    session, runtime = run.session, run.session.runtime
    run.evaluation.before(run.model, state)
    for step in range(state.step + 1, run.steps + 1):
        clock = measure.Clock()
        prompts, slots = run.prompts.at(step)
        with clock("sample"):
            rollout = run.sampler.sample(causal_lm(run.model), prompts, slots, step)  # y ~ π(·|x), k per prompt
        with clock("score"), session.rescue(state, run.model, run.updater.optimizer):
            scored = run.rewards.begin(rollout, step)  # r(x, y): servers answer while the reference reads
        with clock("reference"), session.rescue(state, run.model, run.updater.optimizer):
            rollout = needs.fill(run, rollout, prompts, slots, step)  # log π_ref, and what else the objective asks for
        with clock("score"), session.rescue(state, run.model, run.updater.optimizer):
            rollout = scored(rollout)
        rollout, state = run.objective.prepare(rollout, state, runtime)  # baselines, advantages
        with clock("update"):
            updates = update(run, rollout, step)  # one step, or the passes of the objective
        completions, tokens = measure.totals(rollout, runtime)
        state = state.after(step, updates=len(updates), rows=completions, tokens=tokens)
        stats = passes.on_policy_stats(rollout, updates)
        session.log(step, {**metrics(run, rollout, stats, updates, step), **clock.metrics(completions, tokens)})
        session.samples(step, partial(sample_rows, rollout, stats, run.samples_logged, run.rewards.extras()))
        run.reference.follow(step)  # where it moves
        with session.rescue(state, run.model, run.updater.optimizer):
            run.evaluation.maybe(run.model, step)
        session.guard.check(step, applied=all(each.report.applied for each in updates))
        session.checkpoint(step, state, run.model, run.updater.optimizer, last=step == run.steps)
    run.evaluation.after(run.model, state)
    return state


def update(run: PolicyRun, rollout: Rollout, step: int) -> list[passes.Update]:
    """The optimizer steps of one rollout. The learning rate is a function of their place in the run."""
    plan, updates = passes.passes_of(run.objective), list[passes.Update]()
    for epoch in range(plan.epochs):
        if epoch and plan.stop_kl is not None and needs.drift(run, rollout) > plan.stop_kl:
            break
        for part in passes.parts(rollout, plan, run.seed, step, epoch):
            place = (step - 1) * plan.updates + len(updates) + 1
            updates.append(passes.Update(part, run.updater.step(terms(run, part, step), place)))
    return updates


def terms(run: PolicyRun, rollout: Rollout, step: int) -> list[Term]:
    """The summands of the step's loss: the rollout, and the instruction data where it is mixed in."""
    mixed = [] if run.instruction is None else [run.instruction.at(step)]
    return [Term(objective=run.objective, batch=rollout), *mixed]


def metrics(
    run: PolicyRun, rollout: Rollout, stats: TokenStats, updates: Sequence[passes.Update], step: int
) -> dict[str, float]:
    mixed, runtime = updates[0].report.stats[1:], run.session.runtime
    kept = run.instruction.metrics(run.instruction.at(step).batch, *mixed) if run.instruction is not None else {}
    return {
        **measure.rollout_metrics(rollout, stats, run.beta, runtime),
        **kept,
        **passes.metrics(updates, run.objective, run.updater.max_grad_norm, runtime),
        **run.rewards.metrics(rollout, runtime),
    }
