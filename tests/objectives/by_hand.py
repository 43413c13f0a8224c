"""REINFORCE by hand: five completions of two prompts, whole-number rewards, whole-number KL.

    prompt      row  length  reward  KL by token   KL
    0           0    2       1       1, 2          3
    0           1    1       2       2             2
    0           2    3       6       0, 1, 0       1
    1           3    1       10      4             4
    1           4    2       21      1, 1          2

What a token's log π is multiplied with is read off the gradient: ∂(−Σ A·log π)/∂ log π = −A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import Alone, TokenStats, TrainState
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Prompt, Rollout

NAN = float("nan")
REWARDS = [1.0, 2.0, 6.0, 10.0, 21.0]
GROUP = [0, 0, 0, 1, 1]
LENGTHS = [2, 1, 3, 1, 2]
KL = torch.tensor([[1.0, 2, 0], [2, 0, 0], [0, 1, 0], [4, 0, 0], [1, 1, 0]])
BETA = 0.5  # a power of two, as are most numbers below: sums of them are exact in float32


def make(rewards: Sequence[float], group: Sequence[int], lengths: Sequence[int], **known: Any) -> Rollout:
    """Completions without meaning; only lengths, groups and what is ``known`` matter here."""
    rows = range(len(rewards))
    return Rollout.from_ids(
        [[2] for _ in rows],
        [[5] * lengths[row] for row in rows],
        group=group,
        prompts=tuple(Prompt(row_id=group[row], text="x") for row in rows),
        texts=tuple("" for _ in rows),
        sample=torch.tensor([list(group[:row]).count(group[row]) for row in rows]),
        finished=torch.ones(len(rows), dtype=torch.bool),
        rewards=torch.tensor(rewards),
        **known,
    )


def hand_made(**known: Any) -> Rollout:
    """The table above; the reference gives every token −5 nats, and the sampler agrees with the trainer."""
    reference = torch.full((5, 3), -5.0)
    settings = {"ref_logprobs": reference, "rollout_logprobs": reference + KL, **known}
    return make(REWARDS, GROUP, LENGTHS, **settings)


def without(rollout: Rollout, *rows: int) -> Rollout:
    """The rows could not be scored."""
    assert rollout.rewards is not None
    rewards = rollout.rewards.clone()
    rewards[list(rows)] = NAN
    return replace(rollout, rewards=rewards, valid=torch.isfinite(rewards))


def live() -> TokenStats:
    """What the trainer's forward returns: log π = −5 + KL, and the same numbers as exact KL."""
    return TokenStats(logprobs=(KL - 5).requires_grad_(), kl=KL.clone().requires_grad_())


def by_row(value: Tensor, rollout: Rollout) -> list[list[float]]:
    return [value[row, : int(rollout.completion_mask[row].sum())].tolist() for row in range(len(rollout))]


def multipliers(objective: Reinforce, rollout: Rollout, state: TrainState | None = None) -> list[list[float]]:
    """A of every token, by row; nothing outside the completions may have a gradient."""
    batch, _ = objective.prepare(rollout, state or TrainState(), Alone())
    stats = live()
    (gradient,) = torch.autograd.grad(objective.loss_sum(stats, batch)["policy"], stats.logprobs)
    assert bool((gradient[~batch.completion_mask] == 0).all())
    return by_row(-gradient, batch)


def spread(values: Sequence[float]) -> list[list[float]]:
    """The same number on every token of a completion."""
    return [[value] * length for value, length in zip(values, LENGTHS, strict=True)]


def near(rows: Sequence[Sequence[float]]) -> list[Any]:
    """float32: numbers up to 21, a few operations each."""
    return [pytest.approx(list(row), abs=4e-6) for row in rows]


def label(value: object) -> str:
    """An objective as a test id; nothing for the numbers beside it."""
    if not isinstance(value, Reinforce):
        return ""
    return f"{value.baseline}-{value.beta}-{value.estimator}-{value.credit}"


def advantages(objective: Reinforce, rollout: Rollout, state: TrainState | None = None) -> list[float]:
    """rewards − baseline of every row, as ``prepare`` leaves them."""
    batch, _ = objective.prepare(rollout, state or TrainState(), Alone())
    assert batch.baseline is not None and batch.advantages is not None and rollout.rewards is not None
    assert torch.equal(batch.advantages[batch.valid], (rollout.rewards - batch.baseline)[batch.valid])
    found: list[float] = batch.advantages.tolist()
    return found
