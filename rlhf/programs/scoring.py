"""Held-out measurements of supervised objectives, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf.interfaces import Collective, StatsRequest, TokenStats
from rlhf.models.chat import Dialogue, render_completion, render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.policy import token_stats
from rlhf.models.scalar import scalar_stats
from rlhf.objectives.dpo import PairObjective
from rlhf.objectives.supervised import DemonstrationBatch, PairBatch
from rlhf.programs.measure import global_means
from rlhf.programs.reward_figures import HeldOut, figures
from rlhf.rollout import TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime


def own_part(rows: Sequence[Any], runtime: Collective) -> list[Any]:
    """Every world_size-th row; a rank that would get none takes the first, since collectives need every rank."""
    return list(rows[runtime.rank :: runtime.world_size]) or list(rows[:1])


def demonstration_loss(
    model: nn.Module, rows: Sequence[Dialogue], budget_tokens: int, runtime: Runtime
) -> dict[str, float]:
    """``eval/loss``: nats per trained token on held-out demonstrations."""
    if not rows:
        return {}
    mine = own_part(rows, runtime)
    batch = DemonstrationBatch.of(mine).to(runtime.device)
    request = StatsRequest()
    found = microbatches.score(batch, lambda b: token_stats(model, plain_rows(b), request), budget_tokens, runtime)
    return global_means({"eval/loss": (-found.logprobs[batch.counted].sum(), batch.counted.sum())}, runtime)


def pair_metrics(batch: PairBatch, stats: TokenStats, runtime: Collective) -> dict[str, float]:
    """Accuracy and margin of the pairs just trained on, and their completions' mean score, before the step."""
    assert stats.scores is not None
    better, worse, _ = batch.pairs()
    chosen, rejected = stats.scores[better], stats.scores[worse]
    pairs = torch.tensor(float(len(chosen)), device=chosen.device)
    return global_means(
        {
            "reward_model/accuracy": ((chosen > rejected).sum(), pairs),
            "reward_model/margin": ((chosen - rejected).sum(), pairs),
            "reward_model/score_mean": (stats.scores.sum(), torch.ones_like(stats.scores).sum()),
        },
        runtime,
    )


def preference_metrics(
    batch: TokenBatch, stats: TokenStats, objective: PairObjective, runtime: Collective
) -> dict[str, float]:
    """How far the policy has pulled the step's pairs apart before it, by what the objective compares."""
    pairs, compared = objective.pairs(batch), objective.compared(stats, batch)
    better, worse = compared[pairs.first], compared[pairs.second]
    count = torch.tensor(float(len(better)), device=better.device)
    return global_means(
        {
            "policy/pair_accuracy": ((better > worse).sum(), count),
            "policy/pair_margin": ((better - worse).sum(), count),
            "policy/better_mean": (better.sum(), count),
            "policy/worse_mean": (worse.sum(), count),
        },
        runtime,
    )


def ranking_figures(
    model: nn.Module, rows: HeldOut, tokenizer: Any, budget_tokens: int, runtime: Runtime
) -> dict[str, float]:
    """``eval/…``: what the reward model is worth on held-out pairs, the same on every rank."""
    if not rows.pairs:
        return {}
    mine = own_part(range(len(rows.items)), runtime)
    prompts = [render_prompt(tokenizer, rows.items[i][0]) for i in mine]
    completions = [render_completion(tokenizer, *rows.items[i]) for i in mine]
    batch = TokenBatch.from_ids(prompts, completions).to(runtime.device)
    found = microbatches.score(batch, partial(scalar_stats, model), budget_tokens, runtime)
    assert found.scores is not None
    scores, lengths = torch.zeros(2, len(rows.items), dtype=torch.float64)
    own = (mine, found.scores.tolist(), [len(ids) for ids in completions])
    for places, values, tokens in runtime.gather_objects(own):
        scores[places], lengths[places] = scores.new_tensor(values), lengths.new_tensor(tokens)
    return figures(rows, scores, lengths)


def mean_score(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], budget_tokens: int, runtime: Runtime
) -> float:
    """Mean score of given completions: what centring subtracts."""
    mine = own_part(rows, runtime)
    batch = TokenBatch.from_ids([row[0] for row in mine], [row[1] for row in mine]).to(runtime.device)
    found = microbatches.score(batch, partial(scalar_stats, model), budget_tokens, runtime)
    assert found.scores is not None
    count = torch.tensor(float(len(mine)), device=runtime.device)
    return global_means({"mean": (found.scores.sum(), count)}, runtime)["mean"]
