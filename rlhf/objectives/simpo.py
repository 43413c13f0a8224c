"""SimPO (Meng et al. 2024): pairs of the data compared by log π a token, without a reference.

L = −E_pairs[log σ(β·(log π(y_w)/|y_w| − log π(y_l)/|y_l|) − margin)]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.interfaces import Need, StatsRequest, TokenStats, Unit
from rlhf.maths import losses
from rlhf.objectives.dpo import Labelled
from rlhf.objectives.supervised import PairBatch
from rlhf.rollout import TokenBatch


@dataclass(frozen=True, kw_only=True)
class Simpo:
    """The objective of recipe section ``simpo``. beta: scale of a token's log π. margin: by how much better completions
    must lead, after beta (the paper's γ). Nothing holds the policy near a reference but the learning rate."""

    beta: float = 2.0
    margin: float = 1.0
    name: str = "simpo"
    needs: frozenset[Need] = frozenset({"pairs"})
    unit: Unit = "group"
    request: StatsRequest = field(default_factory=lambda: StatsRequest(entropy=True))

    def count(self, batch: TokenBatch) -> Tensor:
        """Pairs."""
        return torch.tensor(len(self.pairs(batch).first))

    def pairs(self, batch: TokenBatch) -> Labelled:
        assert isinstance(batch, PairBatch)
        better, worse, _ = batch.pairs()
        return Labelled(better, worse, torch.ones(better.shape, device=better.device))

    def compared(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[B] nats a token: log π of each completion over its length."""
        ones = torch.ones_like(stats.logprobs[:, 0])
        return (stats.logprobs * batch.completion_mask).sum(1) * losses.length_normalised(ones, batch.completion_mask)

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        pairs, compared = self.pairs(batch), self.beta * self.compared(stats, batch)
        return {"policy": losses.bradley_terry_sum(compared[pairs.first], compared[pairs.second], self.margin)}
