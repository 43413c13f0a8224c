"""How noisy the gradient is, what a baseline costs, and how to spend the next completion.

g = ∇ log π(y|x), R = the (penalized) reward, μ and σ² its mean and variance given the prompt, m = E[(R − μ)·g] the
prompt's gradient, k = completions per prompt. Variance of a vector means the trace of its covariance. The independent
unit of a rollout is the prompt's GROUP, so batches and noise scales count groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.maths.masking import group_index, masked_fill


def leave_one_out_price(reward_variance: Tensor, score_norm: Tensor, signal: Tensor) -> Tensor:
    """C = σ²·E|g|² + |m|²: what estimating the baseline costs, times (k − 1). Per prompt, [...] each."""
    return reward_variance * score_norm + signal


def leave_one_out_variance(
    second_moment: Tensor, reward_variance: Tensor, score_norm: Tensor, signal: Tensor, k: int
) -> Tensor:
    """k·trCov of a prompt's gradient, averaged over its k completions, with the leave-one-out baseline. Exact.

    E[(R − μ)²|g|²] − |m|² + (σ²·E|g|² + |m|²)/(k − 1). second_moment: E[(R − μ)²|g|²]; reward_variance: σ²;
    score_norm: E|g|²; signal: |m|²; one entry per prompt. (Closed form for Kool et al. 2019's estimator: write
    A_i = (R_i − μ) − mean_{j≠i}(R_j − μ) and expand; only pairs i, j survive.) At small k this can exceed no baseline.
    """
    return second_moment - signal + leave_one_out_price(reward_variance, score_norm, signal) / (k - 1)


def total_variance(within: float, price: float, between: float, k: float) -> float:
    """N·trCov of the batch gradient at N completions, k per prompt, prompts drawn independently.

    within = E_x[E[(R − μ)²|g|²] − |m|²], price = E_x[C], between = trCov_x(m): V_between·k + within + C/(k − 1).
    """
    return within + price / (k - 1) + k * between


def best_k(price: float, between: float) -> float:
    """k* = 1 + √(C / V_between): minimises ``total_variance`` at a fixed number of completions.

    price: E_x[C] (``leave_one_out_price``); between: trCov over prompts of their gradients. Infinite where prompts do
    not differ: then nothing is lost by fewer prompts.
    """
    return 1 + math.sqrt(price / between) if between > 0 else math.inf


def second_moment_sum(advantages: Tensor, score_norms: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """Σ_i Σ_t A_{i,t}²·w_{i,t}: the ledger's price of a baseline, over completions. A [B] or [B, C], w [B, C] → scalar.

    w = ``logprobs.score_norms``. Equals Σ_i |Σ_t A_{i,t}·∇ log π_{i,t}|² where the scores of different tokens are
    orthogonal (a tabular policy); for a network it is a proxy, good for ranking baselines by their ratio.
    """
    counted = mask & valid[:, None]
    per_token = advantages[:, None] if advantages.dim() == 1 else advantages
    return (masked_fill(per_token, counted).square() * masked_fill(score_norms, counted)).sum()


def zero_variance(rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[B] bool: rows of a group of at least two valid rows whose rewards are all equal: they carry no reward signal.

    rewards [B], NaN allowed where not valid; group [B] ids; valid [B] bool. Rows that are not valid are False.
    """
    inverse, groups = group_index(group)
    kept = inverse[valid]
    lowest = rewards.new_full((groups,), math.inf).scatter_reduce(0, kept, rewards[valid], "amin")
    highest = rewards.new_full((groups,), -math.inf).scatter_reduce(0, kept, rewards[valid], "amax")
    several = torch.bincount(kept, minlength=groups) > 1
    return valid & ((lowest == highest) & several)[inverse]


class Noise(NamedTuple):
    """Estimates from one rollout, each unbiased on its own: average them over rollouts SEPARATELY, then divide.

    trace: trΣ, the variance of ONE group's gradient. signal: |G|², the squared norm of the true gradient; the estimate
    may be negative.
    """

    trace: float
    signal: float

    @property
    def scale(self) -> float:
        """B_simple = trΣ / |G|² in groups (McCandlish et al. 2018, eq. 2.9); infinite where no signal was found."""
        return self.trace / self.signal if self.signal > 0 else math.inf


def noise_from_group_norms(sum_of_squares: float, square_of_sum: float, groups: int) -> Noise:
    """From gradients g_1 … g_n of n ≥ 2 groups: Σ|g_i|² and |Σ g_i|² (a U-statistic: every pair is used once).

    |G|² = (|Σg|² − Σ|g|²) / (n(n − 1)) = |ḡ|² − trΣ/n;   trΣ = (Σ|g|² − |Σg|²/n) / (n − 1).
    """
    if groups < 2:
        raise ValueError(f"the noise scale needs at least two groups, got {groups}")
    signal = (square_of_sum - sum_of_squares) / (groups * (groups - 1))
    return Noise(trace=(sum_of_squares - square_of_sum / groups) / (groups - 1), signal=signal)


def noise_from_batch_norms(small_norm: float, big_norm: float, small: int, big: int) -> Noise:
    """From |G_small|² and |G_big|², squared norms of gradients averaged over ``small`` < ``big`` groups.

    |G|² = (B·|G_B|² − b·|G_b|²)/(B − b); trΣ = (|G_b|² − |G_B|²)/(1/b − 1/B) (McCandlish et al. 2018, appendix A.1).
    Linear in the norms, so these may be averages over many batches. Keep B/b ≥ 16: closer sizes estimate badly.
    """
    if not 0 < small < big:
        raise ValueError(f"the small batch must be smaller than the big one, got {small} and {big}")
    signal = (big * big_norm - small * small_norm) / (big - small)
    return Noise(trace=(small_norm - big_norm) / (1 / small - 1 / big), signal=signal)


@dataclass(frozen=True)
class NoiseVerdict:
    """What may be said about the noise scale: its value in groups, or, not ``significant``, a lower bound of it."""

    value: float
    significant: bool

    def __str__(self) -> str:
        return f"{self.value:.3g}" if self.significant else f"> {self.value:.3g}"


def noise_verdict(noise: Noise, groups: int, rollouts: float = 1.0, rank: float = 1.0, z: float = 2.0) -> NoiseVerdict:
    """The noise scale where |G|² is significantly above 0, else the largest x of which "> x" may be said.

    noise: of n = ``groups`` groups (``noise_from_group_norms``), averaged over m = ``rollouts`` independent rollouts
    (an exponential mean with decay d is worth (1 + d)/(1 − d)). rank: a lower bound of (trΣ)²/tr(Σ²), over how many
    directions the noise spreads; 1 is always true. The estimate s of |G|² has variance

        (2·tr(Σ²)/(n(n − 1)) + 4·GᵀΣG/n) / m  ≤  e² + 4·|G|²·trΣ/(n·m·√rank),   e² = 2·(trΣ)²/(n(n − 1)·m·rank),

    since tr(Σ²) ≤ (trΣ)²/rank bounds Σ's largest eigenvalue too. Significant: s > z·e, which a zero gradient passes in
    at most about one case of twenty at z = 2. The bound x divides trΣ by the largest |G|² within z standard errors.
    """
    trace, pairs = max(noise.trace, 0.0), groups * (groups - 1) * rollouts
    error = trace * math.sqrt(2 / (pairs * rank))
    if noise.signal > z * error:
        return NoiseVerdict(noise.scale, True)
    # (G² − s)² = z²·(e² + slope·G²), solved for its larger root; a negative s is taken as 0, which only widens it.
    signal, slope = max(noise.signal, 0.0), 4 * trace / (groups * rollouts * math.sqrt(rank))
    half = signal + z * z * slope / 2
    ceiling = half + math.sqrt(half * half - signal**2 + (z * error) ** 2)
    return NoiseVerdict(trace / ceiling if ceiling > 0 else 0.0, False)
