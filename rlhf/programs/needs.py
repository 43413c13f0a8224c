"""What an objective asks to know of a rollout, each quantity by one pass without gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.policy import token_stats
from rlhf.programs import passes
from rlhf.programs.policy_run import PolicyRun, causal_lm
from rlhf.rollout import Prompt, Rollout, TokenBatch
from rlhf.runtime import microbatches


def fill(run: PolicyRun, rollout: Rollout, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
    """The rollout with what the objective's ``needs`` name."""
    needs, temperature = run.objective.needs, run.objective.request.temperature
    if "reference" in needs:
        request = StatsRequest(temperature=temperature)
        with run.reference.use():
            found = scored(run, rollout, lambda batch: run.reference.stats(run.layout(batch), request))
        rollout = replace(rollout, ref_logprobs=found.logprobs)
    known = {"old_logprobs"} if rollout.old_logprobs is not None else set()  # where the sampler's policy is older
    if (needs - known) & {"old_logprobs", "score_norms", "values"}:
        rollout = _of_policy(run, rollout)
    if "greedy" in needs:
        rollout = replace(rollout, greedy_rewards=_greedy_rewards(run, rollout, prompts, slots, step))
    return rollout


def drift(run: PolicyRun, rollout: Rollout) -> float:
    """How far the updates so far have moved the policy on this rollout, nats a completion."""
    request = StatsRequest(temperature=run.objective.request.temperature)
    found = scored(run, rollout, lambda batch: token_stats(run.model, run.layout(batch), request))
    return passes.drift(rollout, found.logprobs, run.session.runtime)


def _of_policy(run: PolicyRun, rollout: Rollout) -> Rollout:
    """log π_old, and what else the trainer's policy says of its completions before it is updated."""
    needs = run.objective.needs
    request = StatsRequest(
        temperature=run.objective.request.temperature,
        score_norms="score_norms" in needs,
        values="values" in needs,
        entropy=passes.passes_of(run.objective).minibatches > 1,  # no forward of the update sees all rows then
    )
    found = scored(run, rollout, lambda batch: token_stats(run.model, run.layout(batch), request))
    return replace(
        rollout,
        old_logprobs=found.logprobs if rollout.old_logprobs is None else rollout.old_logprobs,
        score_norms=found.score_norms,
        values=found.values,
        entropy=found.entropy,
    )


def _greedy_rewards(
    run: PolicyRun, rollout: Rollout, prompts: Sequence[Prompt], slots: Sequence[int], step: int
) -> Tensor:
    """[B]; NaN where unscorable: ``maths.baselines.greedy`` fills those."""
    best = run.rewards.score(run.sampler.greedy(causal_lm(run.model), prompts, slots, step), step)
    assert best.rewards is not None
    rewards = dict(zip(best.group.tolist(), best.rewards.tolist(), strict=True))
    return torch.tensor([rewards[group] for group in rollout.group.tolist()], device=rollout.group.device)


def scored(run: PolicyRun, batch: TokenBatch, forward: Callable[[TokenBatch], TokenStats]) -> TokenStats:
    """Statistics of the whole batch, in the update's own microbatches."""
    updater = run.updater
    return microbatches.score(batch, forward, updater.microbatch_tokens, run.session.runtime, updater.cost)
