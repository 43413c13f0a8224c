"""Returns and advantages of token rewards. Right-padded [B, C]; time counts only tokens where the mask is True.

A completion ends with its last counted token: nothing is bootstrapped past it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.maths.masking import masked_fill


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = Σ_{u≥t} γ^{u−t}·r_u (Williams 1992). rewards, mask [B, C] → [B, C], 0 where the mask is False."""
    kept = masked_fill(rewards, mask)
    if gamma == 1.0:
        return masked_fill(kept.flip(1).cumsum(1).flip(1), mask)
    out, carried = torch.zeros_like(kept), torch.zeros_like(kept[:, 0])
    for t in reversed(range(kept.shape[1])):
        carried = torch.where(mask[:, t], kept[:, t] + gamma * carried, carried)
        out[:, t] = carried
    return masked_fill(out, mask)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16). All [B, C]; returns (advantages, returns).

    δ_t = r_t + γ·V_{t+1} − V_t, A_t = δ_t + γλ·A_{t+1}, returns = A + V; V after the last token is 0. Detached, 0 where
    the mask is False. γ = λ = 1 and V = 0 give ``reward_to_go``.
    """
    rewards, values = masked_fill(rewards.detach(), mask), masked_fill(values.detach(), mask)
    advantages = torch.zeros_like(values)
    following = carried = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, carried)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = carried
    advantages = masked_fill(advantages, mask)
    return advantages, advantages + values
