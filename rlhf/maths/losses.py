"""Losses as SUMS: whoever owns the global batch divides, once, by one constant.

A mean taken here would depend on how the batch was cut into microbatches. Rows that are not valid and tokens that are
not in the mask are replaced before any arithmetic: they contribute exactly 0 to value and gradient, even where their
inputs are NaN or infinite. logprobs [B, C] nats with gradient; mask [B, C] and valid [B] bool; sums are scalars.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.maths.masking import masked_fill, masked_sum


def policy_gradient_sum(logprobs: Tensor, advantages: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """−Σ_{i,t} A_{i,t}·log π_{i,t} (REINFORCE, Williams 1992). advantages: [B] or [B, C], detached here.

    log π(y|x) is a sum over the completion's tokens, stop token included; it is not divided by the length.
    """
    counted = mask & valid[:, None]
    return -(_per_token(advantages, counted) * masked_fill(logprobs, counted)).sum()


def length_normalised(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B] or [B, C] divided by the completion's length: the per-sequence token mean (1/|y|).

    Biased: it turns the gradient (cosine .967 on the enumerable task) and favours short correct, long wrong answers.
    """
    length = mask.sum(1).clamp(min=1)
    return advantages / (length if advantages.dim() == 1 else length[:, None])


def clipped_surrogate_sum(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    valid: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """−Σ min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high)·A), ρ = π/π_old per token (PPO, Schulman et al. 2017, eq. 7).

    advantages: [B] or [B, C]; old_logprobs [B, C]; both detached here. Returns (loss, number of tokens whose gradient
    the clip removed). At π = π_old the gradient is that of ``policy_gradient_sum``, to the last bit.
    """
    counted = mask & valid[:, None]
    weights = _per_token(advantages, counted)
    ratio = (masked_fill(logprobs, counted) - masked_fill(old_logprobs.detach(), counted)).exp()
    plain, clipped = ratio * weights, ratio.clamp(1 - clip_low, 1 + clip_high) * weights
    cut = counted & (clipped < plain)
    return -torch.where(cut, clipped, plain).sum(), cut.sum()


def sequence_importance_weights(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor,
    cap: float,
    beyond: Literal["truncate", "mask"] = "truncate",
) -> tuple[Tensor, Tensor]:
    """min(π(y|x)/π_old(y|x), cap) per completion, detached. [B, C], [B, C] → ([B], number of rows beyond the cap).

    For more than one update per rollout: the ratio is that of whole completions, a product over tokens; its per-token
    form corrects the wrong distribution. Truncation (Ionides 2008) trades a bias for bounded variance; ``mask`` gives
    rows beyond the cap the weight 0. 0 where invalid.
    """
    counted = mask & valid[:, None]
    log_ratio = masked_fill(logprobs.detach(), counted) - masked_fill(old_logprobs.detach(), counted)
    ratio = log_ratio.sum(1).exp()
    cut = ratio > cap
    weight = torch.where(cut, 0.0, ratio) if beyond == "mask" else ratio.clamp(max=cap)
    return masked_fill(weight, valid), (cut & valid).sum()


def mismatch_weights(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(π(y_t)/π_sampler(y_t), cap) per token, detached; 1 outside the mask. [B, C] nats → [B, C].

    For a sampler that holds the same weights and rounds otherwise (truncated importance sampling, Yao et al. 2025): the
    ratios are near 1 and independent of the policy's own steps, so unlike those of a stale policy they are taken token
    by token, and not multiplied up to long completions.
    """
    log_ratio = masked_fill(logprobs.detach(), mask) - masked_fill(rollout_logprobs.detach(), mask)
    return log_ratio.exp().clamp(max=cap)


def value_loss_sum(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """½Σ max((V − G)², (V_old + clip(V − V_old, ±clip) − G)²) (PPO2's clipped value loss); ½Σ(V − G)² if clip is None.

    values [B, C] with gradient; old_values, returns [B, C], detached here. valid: [B], all rows if None.
    """
    counted = mask if valid is None else mask & valid[:, None]
    values, old, target = (masked_fill(x, counted) for x in (values, old_values.detach(), returns.detach()))
    errors = (values - target).square()
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - target).square())
    return 0.5 * errors.sum()


def bradley_terry_sum(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """−Σ log σ(chosen − rejected − margin) (Bradley & Terry 1952; margin: Touvron et al. 2023, eq. 2). [N], [N]."""
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin).sum()


def dpo_sum(
    margin: Tensor, label: Tensor | float, beta: float, kind: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
) -> Tensor:
    """Loss of pairs by the implicit reward margin, summed. margin [P] = (log π/π_ref)(y_1) − (log π/π_ref)(y_2), nats.

    label: probability that y_1 is the better one, [P] or one number; h = β·margin.
    ``sigmoid``: −p·log σ(h) − (1 − p)·log σ(−h) (DPO, Rafailov et al. 2023, eq. 7; p < 1: conservative DPO).
    ``ipo``: p·(margin − 1/2β)² + (1 − p)·(margin + 1/2β)² (Azar et al. 2023, eq. 17).
    ``robust``: (p·(−log σ(h)) − (1 − p)·(−log σ(−h))) / (2p − 1): unbiased where labels are flipped with probability
    1 − p (Chowdhury et al. 2024); raises ValueError for p ≤ 1/2, where they say nothing.
    """
    p = torch.as_tensor(label, dtype=margin.dtype, device=margin.device).detach()
    if kind == "ipo":
        aim = 1 / (2 * beta)
        return (p * (margin - aim).square() + (1 - p) * (margin + aim).square()).sum()
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if kind == "sigmoid":
        return (p * right + (1 - p) * wrong).sum()
    if bool((p <= 0.5).any()):
        raise ValueError("the robust loss needs labels that are right more often than not")
    return ((p * right - (1 - p) * wrong) / (2 * p - 1)).sum()


def nll_sum(logprobs: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """−Σ log π over counted tokens, nats: the negative log-likelihood of given completions."""
    return -masked_sum(logprobs, mask & valid[:, None])


def _per_token(advantages: Tensor, counted: Tensor) -> Tensor:
    advantages = advantages.detach()
    return masked_fill(advantages[:, None] if advantages.dim() == 1 else advantages, counted)
