"""Several sources of scores made into one reward per completion, without ever inventing a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.interfaces import Alone, Collective, Remote, Reward
from rlhf.rewards.early import Early
from rlhf.rewards.functions import FunctionReward
from rlhf.rollout import Group, Rollout

Combine = Literal["mean", "min", "uwo"]
UWO_COEFFICIENT = 0.5


@dataclass(frozen=True, kw_only=True)
class RewardSet:
    """All reward sources of a run and how they become one number.

    models: (source, weight). Over those with a weight other than 0, ``combine`` gives mean = Σw·s/Σw, min, or uwo =
    mean - ½·variance, the uncertainty-weighted optimisation of Coste et al. (2023) with Σw·(s-mean)²/Σw as variance.
    functions: added as weight · score. A source of weight 0 is scored and logged, and takes no part in reward or
    validity. clip: rewards are clipped to ±clip. overlong: (tokens, price), taken off for every token beyond; a soft
    limit (Yu et al. 2025, §3.4, in its linear form). missing_eos_score: then replaces the reward of every completion
    without a stop token, scorable or not; None = leave it.

    Raises UserError when no source has a weight, or the models' weights sum to 0.
    """

    models: Sequence[tuple[Reward, float]] = ()
    functions: Sequence[FunctionReward] = ()
    combine: Combine = "mean"
    clip: float | None = None
    overlong: tuple[int, float] | None = None
    missing_eos_score: float | None = None
    early: Early = field(init=False, repr=False, compare=False, default_factory=Early)

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.models]
        if not any(weights) and not any(function.weight for function in self.functions):
            raise UserError(
                "every reward source has weight 0, so there is nothing to train on; give one of reward.models or "
                "reward.functions a weight"
            )
        if any(weights) and abs(sum(weights)) < 1e-12:
            raise UserError(
                f"the weights of reward.models {weights} sum to 0, so their mean Σw·s/Σw is not defined; change one"
            )

    def score(self, rollout: Rollout, step: int) -> Rollout:
        """The rollout with ``scores`` (raw, per source), ``rewards`` and ``valid`` filled in.

        valid: valid before, and the reward is finite. rewards: NaN where not valid.
        """
        return self.begin(rollout, step)(rollout)

    def begin(self, rollout: Rollout, step: int) -> Callable[[Rollout], Rollout]:
        """Asks sources that answer from elsewhere (those with ``begin``), and has all others score. The call of what it
        returns waits for the answers, and puts everything into the rollout as it is then."""
        sources = list(self._sources())
        asked = self.early.begin(self.remote, rollout, step)
        here = {name: source.score(rollout, step) for name, source in sources if name not in asked}

        def finish(now: Rollout) -> Rollout:
            return self._scored(now, {name: asked[name]() if name in asked else here[name] for name, _ in sources})

        return finish

    @property
    def remote(self) -> dict[str, Remote]:
        """The sources that answer from elsewhere."""
        return {name: source for name, source in self._sources() if isinstance(source, Remote)}

    def ended(self, group: Group, step: int) -> None:
        """Has them score a prompt's completions before the rollout of this step is whole (``interfaces.Ended``)."""
        self.early.ask(self.remote, group, step)

    def _scored(self, rollout: Rollout, scores: Mapping[str, Tensor]) -> Rollout:
        scored = replace(rollout, scores=scores)
        rewards = self._combined(scored)
        if self.clip is not None:
            rewards = rewards.clamp(-self.clip, self.clip)  # NaN stays NaN
        rewards = rewards - self._length_price(rollout)
        if self.missing_eos_score is not None:
            rewards = torch.where(rollout.finished, rewards, self.missing_eos_score)
        valid = rollout.valid & rewards.isfinite()
        return replace(scored, rewards=torch.where(valid, rewards, torch.nan), valid=valid)

    def metrics(self, rollout: Rollout, collective: Collective | None = None) -> dict[str, float]:
        """Counts over a scored rollout (summed over ranks), and what functions logged on this rank in their last call.

        Keys: ``reward/{unscorable,missing_eos,clipped}_rows``; ``reward/overlong_rows`` and
        ``reward/<source>/unscorable_rows`` where there are any; ``reward/disagreement`` of several models;
        ``reward/<function>/<metric>``; ``time/score_hidden_seconds``.
        """
        counts = {"reward/unscorable_rows": ~rollout.valid}
        replaced = ~rollout.finished if self.missing_eos_score is not None else torch.zeros_like(rollout.finished)
        counts["reward/missing_eos_rows"] = replaced
        limit = torch.inf if self.clip is None else self.clip
        counts["reward/clipped_rows"] = (self._combined(rollout).abs() > limit) & ~replaced
        always = len(counts)
        counts["reward/overlong_rows"] = self._length_price(rollout) > 0
        counts |= {f"reward/{name}/unscorable_rows": score.isnan() for name, score in rollout.scores.items()}
        totals = (collective or Alone()).sum(torch.stack([rows.sum() for rows in counts.values()])).tolist()
        found = zip(counts, totals, strict=True)
        metrics = {name: float(total) for index, (name, total) in enumerate(found) if total or index < always}
        return metrics | self._disagreement(rollout, collective or Alone()) | self._logged() | self.early.metrics()

    def extras(self) -> Mapping[str, list[Any]]:
        """Columns that functions gave to ``log_extra`` in their last call: one value per row of this rank's rollout."""
        return {column: values for function in self.functions for column, values in function.log.extras.items()}

    def _disagreement(self, rollout: Rollout, collective: Collective) -> dict[str, float]:
        """Mean over completions of the standard deviation of the models' scores, of models with a weight."""
        weighted = [s for s, (_, w) in zip(rollout.scores.values(), self.models, strict=False) if w]
        if len(weighted) < 2:
            return {}
        spread = torch.stack(weighted).double().std(0, correction=0)
        known = spread.isfinite()
        total, rows = collective.sum(torch.stack([spread[known].sum(), known.sum()])).tolist()
        return {"reward/disagreement": total / rows} if rows else {}

    def _logged(self) -> dict[str, float]:
        return {
            f"reward/{function.name}/{name}": sum(values) / len(values)
            for function in self.functions
            for name, values in function.log.values.items()
        }

    def _sources(self) -> Iterator[tuple[str, Reward]]:
        """Every source under a name of its own: the second of two alike gets ``-2``."""
        seen: dict[str, int] = {}
        sources: list[Reward] = [*(model for model, _ in self.models), *self.functions]
        for source in sources:
            seen[source.name] = seen.get(source.name, 0) + 1
            yield source.name if seen[source.name] == 1 else f"{source.name}-{seen[source.name]}", source

    def _length_price(self, rollout: Rollout) -> Tensor:
        """[B] what the completion's tokens beyond the limit cost."""
        lengths = rollout.completion_mask.sum(1).float()
        if self.overlong is None:
            return torch.zeros_like(lengths)
        limit, price = self.overlong
        return price * (lengths - limit).clamp(min=0)

    def _combined(self, rollout: Rollout) -> Tensor:
        """[B] reward before clipping and replacement; NaN where a source with a weight could not score the row."""
        scores = list(rollout.scores.values())
        total = torch.zeros(len(rollout), device=rollout.group.device)
        weighted = [(s, w) for s, (_, w) in zip(scores, self.models, strict=False) if w]
        if weighted:
            total = total + combine_models(
                torch.stack([score for score, _ in weighted]), [weight for _, weight in weighted], self.combine
            )
        for score, function in zip(scores[len(self.models) :], self.functions, strict=True):
            if function.weight:
                total = total + function.weight * score
        return total


def combine_models(scores: Tensor, weights: Sequence[float], how: Combine) -> Tensor:
    """[M, B] scores of an ensemble → [B]; NaN where any of them is NaN."""
    if how == "min":
        return scores.amin(0)
    weight = torch.tensor(weights, dtype=scores.dtype, device=scores.device)[:, None]
    mean = (weight * scores).sum(0) / weight.sum()
    if how == "mean":
        return mean
    variance = (weight * (scores - mean).square()).sum(0) / weight.sum()
    return mean - UWO_COEFFICIENT * variance
