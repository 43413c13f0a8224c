"""DPO: pairs of completions pull log π/π_ref apart. The pairs come from the data, or from the policy's own rollout.

L = −E[p·log σ(β·Δ) + (1 − p)·log σ(−β·Δ)],  Δ = log π/π_ref(y_1) − log π/π_ref(y_2)   (Rafailov et al. 2023)

Online, every two completions of a prompt are a pair, and p = σ(r_1 − r_2) is what a Bradley–Terry annotator with the
reward's scale would say. Then, and only then, its optimum is REINFORCE's: π* ∝ π_ref·exp(r/β). With hard labels (the
best against the worst, p = 1) margins grow without bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.interfaces import Collective, Need, Objective, StatsRequest, TokenStats, TrainState, Unit
from rlhf.maths import losses
from rlhf.objectives.supervised import PairBatch
from rlhf.rollout import Rollout, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ReferencedPairs(PairBatch):
    """Pairs of the data with what the reference says of each completion. ref_logprobs: [B, C] nats."""

    ref_logprobs: Tensor


class Labelled(NamedTuple):
    """[P] each: rows of the two completions, and the probability that the first is the better one."""

    first: Tensor
    second: Tensor
    label: Tensor


class PairObjective(Objective, Protocol):
    """An objective of the loop on the data's pairs."""

    def pairs(self, batch: TokenBatch) -> Labelled:
        """What is compared in this batch."""

    def compared(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[B]: the number by which completions are compared, which training pulls apart."""


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """The objective of recipe section ``dpo``. beta: how strongly the reference holds (as in the KL penalty).

    smoothing: share of labels taken to be wrong: conservative with ``sigmoid``, corrected for with ``robust``. labels:
    of online pairs. Log-probabilities are at temperature 1.
    """

    beta: float = 0.05
    loss: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    smoothing: float = 0.0
    labels: Literal["soft", "hard"] = "soft"
    name: str = "dpo"
    needs: frozenset[Need] = frozenset({"scores", "reference", "pairs"})
    unit: Unit = "group"
    request: StatsRequest = field(default_factory=lambda: StatsRequest(entropy=True))

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Nothing to prepare: pairs are made of rewards within a group, when the loss asks for them."""
        return rollout, state

    def count(self, batch: TokenBatch) -> Tensor:
        """Pairs."""
        return torch.tensor(len(self.pairs(batch).first))

    def pairs(self, batch: TokenBatch) -> Labelled:
        """Pairs of the data as they are, or all pairs of a group by their rewards (the extremes, for hard labels)."""
        if isinstance(batch, PairBatch):
            better, worse, _ = batch.pairs()
            return Labelled(better, worse, torch.full(better.shape, 1 - self.smoothing, device=better.device))
        assert isinstance(batch, Rollout) and batch.rewards is not None
        rows: dict[int, list[int]] = {}
        for row, (group, valid) in enumerate(zip(batch.group.tolist(), batch.valid.tolist(), strict=True)):
            rows.setdefault(group, []).extend([row] if valid else [])
        found = [pair for members in rows.values() for pair in self._chosen(members, batch.rewards)]
        index = torch.tensor(found, dtype=torch.long, device=batch.group.device).reshape(-1, 2)
        return Labelled(index[:, 0], index[:, 1], self._label(batch.rewards[index[:, 0]] - batch.rewards[index[:, 1]]))

    def _chosen(self, members: list[int], rewards: Tensor) -> list[tuple[int, int]]:
        """Of rows of one prompt. A tie of the extremes is no hard pair."""
        if self.labels == "soft":
            return list(combinations(members, 2))
        ordered = sorted(members, key=lambda row: float(rewards[row]))
        differ = bool(ordered) and float(rewards[ordered[0]]) < float(rewards[ordered[-1]])
        return [(ordered[-1], ordered[0])] if differ else []

    def _label(self, difference: Tensor) -> Tensor:
        p = torch.sigmoid(difference) if self.labels == "soft" else torch.ones_like(difference)
        return p * (1 - self.smoothing) + (1 - p) * self.smoothing

    def compared(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[B] nats: log π/π_ref of each completion, a sum over tokens."""
        assert isinstance(batch, ReferencedPairs | Rollout) and batch.ref_logprobs is not None
        return torch.where(batch.completion_mask, stats.logprobs - batch.ref_logprobs, 0.0).sum(1)

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        pairs, compared = self.pairs(batch), self.compared(stats, batch)
        margin = compared[pairs.first] - compared[pairs.second]
        return {"policy": losses.dpo_sum(margin, pairs.label, self.beta, self.loss)}
