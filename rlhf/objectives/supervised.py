"""Objectives on given text: SFT, the instruction term of a policy update, and the Bradley–Terry reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rlhf.interfaces import Need, StatsRequest, TokenStats, Unit
from rlhf.maths import losses
from rlhf.rollout import TokenBatch, pad_rows


@dataclass(frozen=True, kw_only=True)
class DemonstrationBatch(TokenBatch):
    """Given completions. counted: [B, C] bool, the tokens to imitate: with several replies in a row, all of theirs."""

    counted: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]]) -> DemonstrationBatch:
        """From (prompt ids, completion ids, which of these are imitated) of each row."""
        counted, _ = pad_rows([row[2] for row in rows], side="right")
        return cls.from_ids([row[0] for row in rows], [row[1] for row in rows], counted=counted.bool())


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """−log π(completion | prompt) of gold completions, at temperature 1.

    per ``token``: SFT, a mean over all completion tokens of the global batch. per ``completion``: the instruction term
    of a policy update (``instruction.coefficient``), a mean over rows of token sums, which is KL(data‖π) up to a
    constant (InstructGPT's pretraining mix, Ouyang et al. 2022, §3.5).
    """

    name: str = "sft"
    per: Literal["token", "completion"] = "token"
    needs: frozenset[Need] = frozenset()
    unit: Unit = "completion"
    request: StatsRequest = field(default_factory=StatsRequest)

    def count(self, batch: TokenBatch) -> Tensor:
        assert isinstance(batch, DemonstrationBatch)
        return (batch.counted & batch.valid[:, None]).sum() if self.per == "token" else batch.valid.sum()

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        assert isinstance(batch, DemonstrationBatch)
        return {self.name: losses.nll_sum(stats.logprobs, batch.counted, batch.valid)}


@dataclass(frozen=True, kw_only=True)
class PairBatch(TokenBatch):
    """Pairs of rows, the chosen one first; a pair is a unit.

    chosen [B] bool; margin [B] float: how much better chosen should score (0 = no margin), the same on both rows.
    """

    chosen: Tensor
    margin: Tensor


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """−log σ(r_chosen − r_rejected − margin), a mean over pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

    name: str = "reward"
    needs: frozenset[Need] = frozenset({"pairs"})
    unit: Unit = "pair"
    request: StatsRequest = field(default_factory=StatsRequest)

    def count(self, batch: TokenBatch) -> Tensor:
        return batch.valid.sum() // 2

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        assert isinstance(batch, PairBatch) and stats.scores is not None
        first, second = batch.chosen & batch.valid, ~batch.chosen & batch.valid
        margin = batch.margin[first].to(stats.scores.dtype)
        return {self.name: losses.bradley_terry_sum(stats.scores[first], stats.scores[second], margin)}
