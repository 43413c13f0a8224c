"""Baselines: what is subtracted from a completion's reward before it multiplies ∇ log π.

E[b·∇ log π(y|x)] = 0 for every b that does not depend on y, so such a baseline changes the variance of the gradient and
not its mean (Williams 1992). rewards [B] in reward units, any order of rows; group [B] int64, rows of one prompt
occurrence share it, groups may differ in size; valid [B] bool. Rows that are not valid (their rewards may be NaN) are
in nobody's baseline and get 0. Statistics are taken in float64 and returned in the dtype of the rewards.

    baseline         unbiased   depends on
    none             yes        nothing
    moving_average   yes        earlier steps
    batch_mean       (1 − 1/B)  all rows, its own included: a smaller step in the right direction
    group_mean       (1 − 1/k)  all completions of the prompt, its own included
    leave_one_out    yes        the other completions of the prompt
    shrinkage        yes        the other completions of the prompt and the other prompts
    greedy           yes        the prompt's greedy completion
    value            yes        a learned function of prompt and earlier tokens
    optimal_token    yes        the other completions of the prompt and their score norms, per token
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.maths.masking import (
    accumulator,
    group_index,
    group_sum,
    leave_one_out_mean,
    leave_one_out_sum,
    masked_fill,
    masked_mean,
)


def advantages(rewards: Tensor, baseline: Tensor, valid: Tensor) -> Tensor:
    """rewards [B] (or [B, C]) − baseline [B] or [B, C], detached; exactly 0 in rows that are not valid."""
    if baseline.dim() == 2:
        valid = valid[:, None]
        rewards = rewards[:, None] if rewards.dim() == 1 else rewards
    return masked_fill(rewards.detach() - baseline.detach(), valid)


def none(rewards: Tensor) -> Tensor:
    """0. [B] → [B]."""
    return torch.zeros_like(rewards)


def moving_average(rewards: Tensor, value: float | None) -> Tensor:
    """The average carried over from earlier steps; 0 before there is one. [B] → [B]."""
    return torch.full_like(rewards, 0.0 if value is None else value)


def update_moving_average(previous: float | None, rewards: Tensor, valid: Tensor, decay: float = 0.9) -> float | None:
    """decay·previous + (1 − decay)·mean(valid rewards), to be called AFTER the baseline has been used.

    The first mean is taken as it is. A batch without a valid row leaves ``previous`` as it was.
    """
    if not bool(valid.any()):
        return previous
    mean = float(masked_mean(rewards.to(accumulator(rewards)), valid))
    return mean if previous is None else decay * previous + (1 - decay) * mean


def batch_mean(rewards: Tensor, valid: Tensor) -> Tensor:
    """Mean of all valid rewards, the row's own included. [B] → [B].

    The expected gradient is exactly (1 − 1/B) times the unbiased one, B = valid rows.
    """
    mean = masked_mean(rewards.to(accumulator(rewards)), valid).to(rewards.dtype)
    return masked_fill(mean.expand_as(rewards), valid)


def group_mean(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Mean of all valid rewards of the prompt, the row's own included. [B] → [B].

    Its advantages are exactly (1 − 1/k) times those of ``leave_one_out``, k = the group's valid rows.
    """
    inverse, _ = group_index(group)
    size = group_sum(torch.ones_like(rewards), group, valid).clamp(min=1)
    mean = (group_sum(rewards, group, valid) / size)[inverse]
    return masked_fill(mean, valid).to(rewards.dtype)


def leave_one_out(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Mean reward of the other valid completions of the prompt (Kool et al. 2019; Ahmadian et al. 2024, §2.3). [B].

    A row whose group has no other valid row gets its own reward, hence advantage 0: it has nothing to be compared with.
    """
    mean, has_others = leave_one_out_mean(rewards, group, valid)
    return masked_fill(torch.where(has_others, mean, rewards), valid)


def shrinkage(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """(1 − λ)·leave-one-out + λ·mean of the other groups' means. [B] → [B].

    With σ² the variance within groups, τ² that of the prompts' means, k the size of the row's group and P the number of
    groups, leave-one-out estimates the prompt's mean with error σ²/(k−1) and the other groups with error
    c = τ²·P/(P−1) + σ²·avg(1/k_h)/(P−1); λ = (σ²/(k−1)) / (σ²/(k−1) + c) makes the mix best (James & Stein 1961 in
    its empirical-Bayes form). σ², τ² (one-way analysis of variance) and the mean of the other groups are computed
    WITHOUT the row's group, so λ and all that it weighs are independent of the completion given the prompt: unbiased.
    A row alone in its group takes the other groups' mean (λ = 1). With fewer than four groups two variances cannot be
    told apart: leave-one-out. Cost O(B).
    """
    inverse, _ = group_index(group)
    alone = leave_one_out(rewards, group, valid)
    size = group_sum(torch.ones_like(rewards), group, valid)
    present = size > 0
    if int(present.sum()) < 4:
        return alone
    means = group_sum(rewards, group, valid) / size.clamp(min=1)
    spread = group_sum((rewards - means[inverse]).square(), group, valid)
    weight, others = _weight_of_others(means, spread, size, present)
    own_mean = torch.where(size[inverse] > 1, alone.to(means.dtype), 0.0)
    mixed = (1 - weight[inverse]) * own_mean + weight[inverse] * others[inverse]
    return masked_fill(mixed, valid).to(rewards.dtype)


def _weight_of_others(means: Tensor, spread: Tensor, size: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """λ and the mean of the other groups' means, per group [n], each from the other groups only."""
    # Variances do not depend on the centre; near the values they keep their digits. The median holds beside an outlier.
    centre = means[present].median()
    shifted = masked_fill(means - centre, present)
    freedom = masked_fill(size - 1, present)
    count = present.sum() - 1
    freedom_others = _without_own(freedom)
    within = _without_own(spread) / freedom_others.clamp(min=1)
    mean_others = _without_own(shifted) / count
    between = (_without_own(shifted.square()) - count * mean_others.square()) / (count - 1)
    inverse_size = _without_own(masked_fill(1 / size.clamp(min=1), present)) / count
    prompts = (between - within * inverse_size).clamp(min=0)
    error = prompts * (count + 1) / count + within * inverse_size / count
    # λ = (within/(k−1)) / (within/(k−1) + error), multiplied out so that k = 1 gives 1 and no spread gives 0.
    scale = within + freedom * error
    weight = torch.where((scale > 0) & (freedom_others > 0), within / scale.where(scale > 0, 1.0), 0.0)
    return torch.where(freedom == 0, 1.0, weight), mean_others + centre


def _without_own(x: Tensor) -> Tensor:
    """Σ_{h≠g} x_h for every g, [n] → [n]: what comes before plus what comes after, so nothing of x_g is left behind."""
    before = F.pad(x.cumsum(0)[:-1], (1, 0))
    after = F.pad(x.flip(0).cumsum(0)[:-1], (1, 0)).flip(0)
    return before + after


def greedy(greedy_rewards: Tensor) -> Tensor:
    """Reward of the prompt's greedy completion (ReMax, Li et al. 2023). [B] → [B].

    Where the greedy completion could not be scored (NaN): the mean of those that could, or 0.
    """
    scored = greedy_rewards.isfinite()
    return torch.where(scored, greedy_rewards, masked_mean(greedy_rewards, scored)).detach()


def value(values: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """Learned state values [B, C], detached, 0 where nothing counts: advantage = returns − values.

    Unbiased because V_t is a function of the prompt and the tokens before t.
    """
    return masked_fill(values.detach(), mask & valid[:, None])


# A completion made of certain tokens has score norm 0. The floor gives it a weight, so that a group of such completions
# has its plain mean as baseline. Independent of the samples, hence harmless to unbiasedness.
_WEIGHT_FLOOR = 1e-8


def optimal_token(rewards: Tensor, score_norms: Tensor, mask: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """b_{i,t} = Σ_{j≠i} W_{j,t}·R_j / Σ_{j≠i} W_{j,t} over the other valid rows of the group. [B], [B, C] → [B, C].

    W_{j,t} = Σ_{u≤t} score_norms_{j,u}; past j's end it keeps its last value. The variance-minimising constant baseline
    is E[R·‖∇ log π‖²] / E[‖∇ log π‖²] (Greensmith et al. 2004); forms that include sample i itself are biased. A row
    without others gets its own reward (advantage 0). Worse than ``leave_one_out`` for groups below about 16.
    """
    norms = masked_fill(score_norms.detach().clamp(min=0), mask & valid[:, None]).to(accumulator(rewards))
    weights = norms.cumsum(1) + _WEIGHT_FLOOR
    kept = masked_fill(rewards.detach(), valid).to(weights.dtype)
    total, count = leave_one_out_sum(weights, group, valid)
    weighted, _ = leave_one_out_sum(weights * kept[:, None], group, valid)
    has_others = (count > 0)[:, None]
    baseline = torch.where(has_others, weighted / total.where(has_others, 1.0), kept[:, None])
    return masked_fill(baseline, mask & valid[:, None]).to(rewards.dtype)


def group_std(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation (over n) of the valid rewards of the row's prompt. [B] → [B], detached.

    What GRPO (Shao et al. 2024) divides by. Biased: every prompt's gradient is divided by its own random spread, which
    turns the mean gradient (cosine .875 to .89 on the enumerable task) and weighs prompts by how little their rewards
    vary.
    """
    inverse, _ = group_index(group)
    size = group_sum(torch.ones_like(rewards), group, valid).clamp(min=1)
    centred = rewards - group_mean(rewards, group, valid)
    std = (group_sum(centred.square(), group, valid) / size).sqrt()[inverse]
    return masked_fill(std, valid).to(rewards.dtype).detach()


def group_standardised(rewards: Tensor, group: Tensor, valid: Tensor, eps: float = 1e-8) -> Tensor:
    """ADVANTAGES (R − ``group_mean``) / (``group_std`` + eps) (GRPO, Shao et al. 2024). [B] → [B]."""
    centred = advantages(rewards, group_mean(rewards, group, valid), valid)
    return masked_fill(centred / (group_std(rewards, group, valid) + eps), valid)


def whitened(
    advantages: Tensor,
    mask: Tensor,
    eps: float = 1e-8,
    total: Callable[[Tensor], Tensor] = lambda own: own,
    keep_mean: bool = False,
) -> Tensor:
    """(A − mean) / std over everything that counts (REINFORCE++, Hu 2025). [B] or [B, C] with a mask of that shape.

    total: sums over processes, where each holds a part. keep_mean: the mean is added again (reward whitening of Ziegler
    et al. 2019): only the spread changes.

    One scale for the whole batch keeps the direction up to O(1/B); the scale itself is random.
    """
    wide = masked_fill(advantages.detach().to(accumulator(advantages)), mask)
    count = total(mask.sum().to(wide.dtype))
    mean = total(wide.sum()) / count.clamp(min=1)
    centred = masked_fill(wide - mean, mask)
    std = (total(centred.square().sum()) / (count - 1).clamp(min=1)).sqrt()
    scaled = centred / (std + eps)
    return (masked_fill(scaled + mean, mask) if keep_mean else scaled).to(advantages.dtype)
