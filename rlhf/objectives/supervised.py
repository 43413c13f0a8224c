"""Objectives on given text: SFT, the instruction term of a policy update, and the Bradley–Terry reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
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


class Pairs(NamedTuple):
    """[P] each: row of the preferred completion, row of the other one, how much better it should score (0 = any)."""

    better: Tensor
    worse: Tensor
    margin: Tensor


@dataclass(frozen=True, kw_only=True)
class PairBatch(TokenBatch):
    """Completions and which of them are preferred to which; the completions of a prompt are a unit.

    A completion is one row however many pairs it is in: K forwards for the K(K − 1)/2 pairs of a prompt, and never two
    gradients of one completion from different steps (Ouyang et al. 2022, §3.5).

    member  [B] int64: the row's number within its group
    beats   B tuples: (member, margin) of every completion of its group that this row is preferred to
    """

    member: Tensor
    beats: tuple[tuple[tuple[int, float], ...], ...]

    def pairs(self) -> Pairs:
        """All pairs between valid rows."""
        groups, members, valid = self.group.tolist(), self.member.tolist(), self.valid.tolist()
        place = {key: row for row, key in enumerate(zip(groups, members, strict=True))}
        found = [
            (row, place[groups[row], other], margin)
            for row, beaten in enumerate(self.beats)
            if valid[row]
            for other, margin in beaten
        ]
        rows = torch.tensor([pair[:2] for pair in found], dtype=torch.long, device=self.group.device).reshape(-1, 2)
        margin = torch.tensor([pair[2] for pair in found], dtype=torch.float32, device=self.group.device)
        return Pairs(rows[:, 0], rows[:, 1], margin)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """−log σ(r_chosen − r_rejected − margin), a mean over pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

    name: str = "reward"
    needs: frozenset[Need] = frozenset({"pairs"})
    unit: Unit = "pair"
    request: StatsRequest = field(default_factory=StatsRequest)

    def count(self, batch: TokenBatch) -> Tensor:
        assert isinstance(batch, PairBatch)
        return torch.tensor(
            sum(len(beaten) for beaten, valid in zip(batch.beats, batch.valid.tolist(), strict=True) if valid)
        )

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        assert isinstance(batch, PairBatch) and stats.scores is not None
        better, worse, margin = batch.pairs()
        scores = stats.scores
        return {self.name: losses.bradley_terry_sum(scores[better], scores[worse], margin.to(scores.dtype))}
