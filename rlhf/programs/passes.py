"""One rollout, several optimizer steps: how it is cut, and what the steps say together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from rlhf.data.order import epoch_permutation
from rlhf.interfaces import Collective, Passes, PolicyObjective, TokenStats
from rlhf.maths import kl
from rlhf.programs import measure
from rlhf.rollout import Rollout
from rlhf.runtime.updater import UpdateReport


@dataclass(frozen=True)
class Update:
    """One optimizer step and the part of the rollout it was made of."""

    part: Rollout
    report: UpdateReport


def passes_of(objective: PolicyObjective) -> Passes:
    """How often the objective goes over a rollout; once, in one step, where it does not say."""
    found: Passes = getattr(objective, "passes", Passes())
    return found


def parts(rollout: Rollout, passes: Passes, seed: int, step: int, epoch: int) -> Iterator[Rollout]:
    """The rollout of each optimizer step of an epoch: whole groups, dealt as a function of seed, step and epoch."""
    if passes.minibatches == 1:
        yield rollout
        return
    groups = sorted(set(rollout.group.tolist()))
    order = epoch_permutation(len(groups), seed, step * passes.epochs + epoch)
    for first in range(passes.minibatches):
        chosen = torch.tensor([groups[i] for i in order[first :: passes.minibatches]], device=rollout.group.device)
        yield rollout.select(torch.nonzero(torch.isin(rollout.group, chosen))[:, 0])


def drift(rollout: Rollout, logprobs: Tensor, collective: Collective) -> float:
    """KL(π_old‖π) in nats a completion: the mean of Σ_t (ρ_t − 1 − log ρ_t), ρ = π/π_old, which is never negative."""
    assert rollout.old_logprobs is not None
    old, now = rollout.old_logprobs.double(), logprobs.double()
    total = kl.k3_token_loss_sum(old, now, rollout.completion_mask, rollout.valid)
    return measure.global_means({"drift": (total, rollout.valid.sum())}, collective)["drift"]


def on_policy_stats(rollout: Rollout, updates: Sequence[Update]) -> TokenStats:
    """Statistics of the whole rollout under the policy that sampled it: of the first forward where it saw all rows."""
    first = updates[0]
    if len(first.part) == len(rollout):
        return first.report.stats[0]
    assert rollout.old_logprobs is not None
    return TokenStats(logprobs=rollout.old_logprobs, entropy=rollout.entropy)


def metrics(
    updates: Sequence[Update], objective: PolicyObjective, max_grad_norm: float | None, collective: Collective
) -> dict[str, float]:
    """Means over the steps of the rollout, what the objective tells of them, and how far the last epoch had drifted
    from the policy that sampled."""
    passes = passes_of(objective)
    rows = [measure.update_metrics(update.report, max_grad_norm) for update in updates]
    names = dict.fromkeys(name for row in rows for name in row)  # a step that was skipped was not measured
    means = {name: fmean([row[name] for row in rows if name in row]) for name in names}
    means["optim/lr"] = rows[-1]["optim/lr"]
    if passes.updates > 1:
        means["optim/updates"] = float(len(updates))
    if updates[0].part.old_logprobs is not None:  # several updates a rollout, or completions of an older policy
        means["policy/effective_sample_share"] = _effective_share(updates[-passes.minibatches :], collective)
    tell = getattr(objective, "diagnostics", None)
    told = [tell(each.report.stats[0], each.part) for each in updates] if tell is not None else [{}]
    return {**means, **(measure.global_means(_joined(told), collective) if told[0] else {})}


def _joined(told: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of several steps added up."""
    columns = {name: [each[name] for each in told] for name in told[0]}
    return {
        name: (torch.stack([a.double() for a, _ in pairs]).sum(), torch.stack([n.double() for _, n in pairs]).sum())
        for name, pairs in columns.items()
    }


def _effective_share(updates: Sequence[Update], collective: Collective) -> float:
    """(Σw)² / (n·Σw²) of the completions' importance weights w = π/π_old: 1 = on-policy, 1/n = one row decides."""
    weights = torch.cat([_weights(update) for update in updates])
    total, square, count = collective.sum(
        torch.stack([weights.sum(), weights.square().sum(), weights.new_tensor(float(len(weights)))])
    ).tolist()
    return total * total / (count * square) if square else 0.0


def _weights(update: Update) -> Tensor:
    part, stats = update.part, update.report.stats[0]
    assert part.old_logprobs is not None
    log_ratio = torch.where(part.completion_mask, stats.logprobs - part.old_logprobs, 0.0).sum(1)
    return log_ratio.double().exp()[part.valid]
