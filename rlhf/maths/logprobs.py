"""Statistics of next-token distributions, all from one log-softmax.

V = vocabulary. Logits are divided by the sampling temperature T first, so every number here is of π_T, the
distribution completions are drawn from. Nothing is computed in less than float32; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log π_T over the last axis, nats. [..., V] → [..., V] in float32, or float64 if the logits are.

    Half precision is widened before the division: near −10 nats neighbouring bfloat16 numbers are 1/16 apart.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log π_T(target), nats. logits [..., V], targets [...] int64 → [...]."""
    return chosen(log_softmax(logits, temperature), targets)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ_v π_T log π_T, nats. [..., V] → [...]. A token of probability 0 contributes 0."""
    return entropy_of(log_softmax(logits, temperature))


def score_norms(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """1 − 2π_T(y) + Σ_v π_T(v)² = ‖onehot(y) − π_T‖². logits [..., V], targets [...] → [...].

    The squared norm of ∇ log π_T(y) with respect to logits / T: exact for a tabular policy, a proxy for a network. It
    weighs rewards in the variance-optimal baseline (Greensmith et al. 2004) and in the variance ledger.
    """
    return score_norms_of(log_softmax(logits, temperature), targets)


def chosen(full: Tensor, targets: Tensor) -> Tensor:
    """The targets' entries of ``full``. [..., V], [...] → [...]."""
    return full.gather(-1, targets[..., None]).squeeze(-1)


def entropy_of(full: Tensor) -> Tensor:
    """``entropy`` of log-probabilities already computed. [..., V] → [...]."""
    # 0·(−inf) is NaN in the value and in the gradient: a forbidden token's logprob is replaced before it is used.
    finite = full.masked_fill(full == -torch.inf, 0.0)
    return -(full.exp() * finite).sum(-1)


def score_norms_of(full: Tensor, targets: Tensor) -> Tensor:
    """``score_norms`` of log-probabilities already computed. [..., V], [...] → [...].

    Summed as (1 − π(y))² + Σ_{v≠y} π(v)²: no cancellation where the token is nearly certain, and never negative.
    """
    others = full.exp().square().scatter(-1, targets[..., None], 0.0).sum(-1)
    return torch.expm1(chosen(full, targets)).square() + others
