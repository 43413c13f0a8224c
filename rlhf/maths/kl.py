"""KL toward the reference: estimators, how a token is charged with it, and its loss-side forms.

δ_t = log π(y_t|·) − log π_ref(y_t|·), policy minus reference, in nats; KL of a completion is the SUM over its tokens.
B = rows, C = padded width, V = vocabulary. ``mask`` [B, C] and ``valid`` [B] are True where things count.

    estimator (design: docs/algorithms.md)      gradient of KL(π‖π_ref)
    k1 in the reward, sequence or to-go         unbiased
    exact: exact_local in the loss and
           credit="future" in the advantage     unbiased, the least variance
    k2 on the sequence, in the loss             unbiased on-policy (= k1 in the reward, no baseline)
    exact_local alone, in the loss              biased: blind to what a token does to later KL
    k3 per token, in the loss (GRPO)            biased: the forward KL of each next-token distribution
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf.maths.masking import leave_one_out_mean, masked_fill

Credit = Literal["sequence", "to_go", "future"]


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """δ: unbiased for KL under samples of π, of either sign (Schulman 2020)."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½δ²: biased as a value, but its gradient on-policy is that of KL(π‖π_ref) (Schulman 2020)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^{−δ} − 1 + δ ≥ 0: unbiased as a value; its gradient is that of the FORWARD KL(π_ref‖π) (Schulman 2020)."""
    delta = logprobs - ref_logprobs
    return torch.expm1(-delta) + delta


def exact_kl(policy_logprobs_full: Tensor, ref_logprobs_full: Tensor) -> Tensor:
    """Σ_v π(v)·(log π(v) − log π_ref(v)), nats, differentiable in the policy. [..., V], [..., V] → [...].

    Both must be normalised log-probabilities at the same temperature. A token that the policy gives probability 0
    contributes 0, whatever the reference says; one that only the reference forbids makes the KL infinite.
    """
    probs = policy_logprobs_full.exp()
    return (probs * masked_fill(policy_logprobs_full - ref_logprobs_full, probs > 0)).sum(-1)


def kl_to_go(kl: Tensor, mask: Tensor, *, inclusive: bool) -> Tensor:
    """Suffix sums over counted tokens: KL_{≥t} if ``inclusive``, else the strict future KL_{>t}. [B, C] → [B, C] nats.

    0 where the mask is False, hence past a row's end.
    """
    suffix = masked_fill(kl, mask).flip(1).cumsum(1).flip(1)
    if not inclusive:
        suffix = torch.nn.functional.pad(
            suffix[:, 1:], (0, 1)
        )  # shifted, not subtracted: the last token's is exactly 0
    return masked_fill(suffix, mask)


def kl_penalty_advantage(
    kl: Tensor, mask: Tensor, group: Tensor, valid: Tensor, *, credit: Credit, centre: bool
) -> Tensor:
    """What a token is charged with: advantage = score part − β·c. Detached. [B, C] nats → c [B, C] nats.

    kl: k1 for ``sequence`` and ``to_go``, exact per-position KL for ``future`` (which needs ``exact_local_loss_sum``
    beside it for the token's own KL). With ``centre``, minus the mean over the other valid rows of the group:

        sequence   KL_i          − mean_{j≠i} KL_j
        to_go      KL_{i,≥t}     − mean_{j≠i} KL_{j,≥t}      (0 past j's end)
        future     KL_{i,>t}     − mean_{j≠i} KL_{j,>t}      (0 past j's end)

    The subtracted part does not depend on completion i, so each form is unbiased: E[c·∇log π_t] summed over t is
    ∇KL (for ``future``, ∇KL without Σ_t ∇KL_t at the visited prefixes). A per-sequence baseline under ``to_go`` is
    unbiased too but has more variance than ``sequence``, and is not offered. A row without another valid row in its
    group is not centred. 0 at masked tokens and in invalid rows.
    """
    counted = mask & valid[:, None]
    kept = masked_fill(kl.detach(), counted)
    if credit == "sequence":
        charge = kept.sum(1)
    elif credit in ("to_go", "future"):
        charge = kl_to_go(kept, counted, inclusive=credit == "to_go")
    else:
        raise ValueError(f"credit {credit!r}: one of sequence, to_go, future")
    if centre:
        charge = charge - leave_one_out_mean(charge, group, valid)[0]
    return masked_fill(charge[:, None] if charge.dim() == 1 else charge, counted)


def k2_sequence_loss_sum(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, valid: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Σ_i w_i·½(Σ_t δ_{i,t})². logprobs [B, C] with gradient, ref_logprobs [B, C], weight [B] (None = 1) → scalar.

    On-policy its gradient is Σ_i KL_i·∇log π(y_i), that of k1 in the reward without a baseline: unbiased for ∇KL.
    """
    return 0.5 * _weighted(_delta(logprobs, ref_logprobs, mask & valid[:, None]).sum(1).square(), weight).sum()


def k3_token_loss_sum(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, valid: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Σ_{i,t} w_i·k3 (GRPO, Shao et al. 2024, eq. 4). Shapes as ``k2_sequence_loss_sum``.

    Biased: on-policy the gradient is that of Σ_t KL(π_ref‖π) of the next-token distributions at the sampled prefixes.
    """
    delta = _delta(logprobs, ref_logprobs, mask & valid[:, None])
    return _weighted((torch.expm1(-delta) + delta).sum(1), weight).sum()


def exact_local_loss_sum(kl: Tensor, mask: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ_{i,t} w_i·KL_t(prefix), exact over the vocabulary. kl [B, C] with gradient, weight [B] (None = 1) → scalar.

    Alone it is biased (it holds the prefixes fixed). With ``kl_penalty_advantage(credit="future")`` in the advantage it
    is the exact estimator: ∇E[Σ_t KL_t] = E[Σ_t ∇KL_t] + E[Σ_t KL_{>t}·∇log π_t].
    """
    return _weighted(masked_fill(kl, mask & valid[:, None]).sum(1), weight).sum()


def adapted_beta(beta: float, kl: float, target: float, gain: float = 0.1) -> float:
    """β·(1 + gain·clip(KL/target − 1, ±0.2)): the coefficient of the next step (Ziegler et al. 2019, §2.2).

    kl, target: nats a completion. At most ±2 % a step: tens of steps to double it.
    """
    return beta * (1 + gain * min(max(kl / target - 1, -0.2), 0.2))


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else rows * weight.detach()


def _delta(logprobs: Tensor, ref_logprobs: Tensor, counted: Tensor) -> Tensor:
    return masked_fill(logprobs, counted) - masked_fill(ref_logprobs.detach(), counted)
