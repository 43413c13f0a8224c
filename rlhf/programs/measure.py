"""The metrics of a policy step, as global means. docs/metrics.md explains each: formula, unit, what bad looks like."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.interfaces import Collective, TokenStats
from rlhf.maths import variance
from rlhf.rollout import Rollout
from rlhf.runtime.updater import UpdateReport


@dataclass
class Clock:
    """Seconds spent in each phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - start

    def metrics(self, completions: int, tokens: int) -> dict[str, float]:
        total = max(time.monotonic() - self.started, 1e-9)
        return {
            **{f"time/{phase}_seconds": spent for phase, spent in self.seconds.items()},
            "time/step_seconds": total,
            "throughput/completions_per_second": completions / total,
            "throughput/tokens_per_second": tokens / total,
        }


def sequence_kl(rollout: Rollout, stats: TokenStats) -> Tensor:
    """[B] nats: KL of policy from reference summed over the completion; exact where the forward had it, else k1."""
    if stats.kl is not None:
        return stats.kl.sum(1)
    reference = stats.ref_logprobs if stats.ref_logprobs is not None else rollout.ref_logprobs
    assert reference is not None
    return torch.where(rollout.completion_mask, stats.logprobs - reference, 0.0).sum(1)


def global_means(sums: Mapping[str, tuple[Tensor, Tensor]], collective: Collective) -> dict[str, float]:
    """{name: (sum on this rank, count on this rank)} → {name: mean over all ranks}, in one reduction.

    A mean over nothing is NaN.
    """
    names = list(sums)
    stacked = torch.stack([torch.stack([sums[n][0].double(), sums[n][1].double()]) for n in names])
    totals = collective.sum(stacked)
    return {n: float(t[0] / t[1]) if float(t[1]) else float("nan") for n, t in zip(names, totals, strict=True)}


def totals(rollout: Rollout, collective: Collective) -> tuple[int, int]:
    """Completions and completion tokens of the step over all ranks."""
    own = torch.tensor([len(rollout), int(rollout.completion_mask.sum())], device=rollout.group.device)
    completions, tokens = collective.sum(own).tolist()
    return int(completions), int(tokens)


def rollout_metrics(rollout: Rollout, stats: TokenStats, beta: float, collective: Collective) -> dict[str, float]:
    """Rewards, KL, entropy, lengths and diversity of one rollout."""
    assert rollout.rewards is not None
    valid, rows = rollout.valid, torch.ones_like(rollout.valid)
    mask = rollout.completion_mask & valid[:, None]
    beta = beta if rollout.beta is None else rollout.beta
    kl = sequence_kl(rollout, stats)
    sums = {
        "reward/score_mean": _over(rollout.rewards, valid),
        "reward/score_square": _over(rollout.rewards.square(), valid),
        "reward/penalized_mean": _over(rollout.rewards - beta * kl, valid),
        "kl/reference": _over(kl, valid),
        "kl/reference_per_token": (_over(kl, valid)[0], mask.sum()),
        "completion/length_mean": _over(rollout.completion_mask.sum(1), rows),
        "completion/eos_rate": _over(rollout.finished, rows),
        "completion/distinct_rate": (torch.tensor(float(len(set(rollout.texts))), device=kl.device), rows.sum()),
        "reward/valid_rate": _over(valid, rows),
        "reward/zero_variance_rate": _over(variance.zero_variance(rollout.rewards, rollout.group, valid), valid),
    }
    if stats.entropy is not None:
        sums["policy/entropy"] = (torch.where(mask, stats.entropy, 0.0).sum(), mask.sum())
    if rollout.returns is not None and rollout.values is not None:
        sums |= _value_sums(rollout.values, rollout.returns, mask)
    if rollout.rollout_logprobs is not None and stats.logprobs is not rollout.rollout_logprobs:
        gap = torch.where(mask, (stats.logprobs - rollout.rollout_logprobs).abs(), 0.0)
        sums["policy/sampler_gap"] = (gap.sum(), mask.sum())
    for name, score in rollout.scores.items():
        sums[f"reward/{name}_mean"] = _over(score, torch.isfinite(score))
    means = global_means(sums, collective)
    square = means.pop("reward/score_square")
    if "value/return_square" in means:
        spread = means.pop("value/return_square") - means["value/return_mean"] ** 2
        means["value/explained_variance"] = 1 - means["value/squared_error"] / spread if spread > 0 else float("nan")
    if rollout.beta is not None:
        means["kl/beta"] = rollout.beta
    means["reward/score_std"] = max(square - means["reward/score_mean"] ** 2, 0.0) ** 0.5
    return means


def _value_sums(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over tokens of what tells whether the critic knows anything."""
    kept = {
        "value/value_mean": values,
        "value/return_mean": returns,
        "value/return_square": returns.square(),
        "value/squared_error": (values - returns).square(),
    }
    return {name: (torch.where(mask, value.double(), 0.0).sum(), mask.sum()) for name, value in kept.items()}


def update_metrics(report: UpdateReport, max_grad_norm: float | None) -> dict[str, float]:
    """Losses, gradient norm and step size of one optimizer step."""
    clipped = max_grad_norm is not None and report.grad_norm > max_grad_norm
    return {
        **{"policy/loss" if name == "policy" else f"loss/{name}": value for name, value in report.losses.items()},
        "optim/grad_norm": report.grad_norm,
        "optim/clip_fraction": float(clipped),
        "optim/lr": report.lr,
        "optim/skipped": float(not report.applied),
        **report.measured,
    }


def _over(value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``value`` over the rows that count, and how many they are."""
    return torch.where(rows, value.double(), 0.0).sum(), rows.sum()
