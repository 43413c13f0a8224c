"""What a reward model is worth on held-out rows: accuracy, calibration, AUC, and what length alone would have reached.

Every completion is scored once, however many pairs it is in; the figures are arithmetic on those scores.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.examples import Demonstration, Preference
from rlhf.maths import ranking
from rlhf.rollout import Prompt

CONFIDENCE = ("lowest", "low", "high", "highest")  # quarters of the pairs by |margin|
SHOWN_FIRST = "chosen_first"  # the column that says which completion the annotator saw first


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out completions, each once, and what is known about them as positions in that list.

    items: (prompt, completion). better, worse: [P] the two sides of each pair. cluster: [P] pairs of one prompt share
    a number. pairs: what the rows were. positive, negative: labelled texts, all of which can be compared.
    """

    items: tuple[tuple[Prompt, str], ...]
    better: Tensor
    worse: Tensor
    cluster: Tensor
    pairs: tuple[Preference, ...]
    positive: Tensor
    negative: Tensor


def held_out(pairs: Sequence[Preference], labelled: Sequence[Demonstration] | None = None) -> HeldOut:
    """labelled: all labelled texts of the rows; None = those that the pairs without a prompt were made of."""
    places: dict[Hashable, int] = {}
    items: list[tuple[Prompt, str]] = []

    def place(prompt: Prompt, text: str) -> int:
        key = (prompt.turns, prompt.text, text)
        if key not in places:
            places[key] = len(items)
            items.append((prompt, text))
        return places[key]

    better = [place(pair.prompt, pair.chosen) for pair in pairs]
    worse = [place(pair.prompt, pair.rejected) for pair in pairs]
    prompts: dict[Hashable, int] = {}
    cluster = [prompts.setdefault(_shared(pair.prompt) or index, len(prompts)) for index, pair in enumerate(pairs)]
    if labelled is None:
        alone = [index for index, pair in enumerate(pairs) if not _shared(pair.prompt)]
        sides = [[side[index] for index in alone] for side in (better, worse)]
    else:
        texts = [(bool(text.prompt.columns["label"]), place(text.prompt, text.completion)) for text in labelled]
        sides = [[at for label, at in texts if label is wanted] for wanted in (True, False)]
    return HeldOut(
        items=tuple(items),
        better=torch.tensor(better, dtype=torch.long),
        worse=torch.tensor(worse, dtype=torch.long),
        cluster=torch.tensor(cluster, dtype=torch.long),
        pairs=tuple(pairs),
        positive=torch.tensor(sides[0], dtype=torch.long),
        negative=torch.tensor(sides[1], dtype=torch.long),
    )


def _shared(prompt: Prompt) -> Hashable:
    """What pairs of one prompt have in common; None for labelled text."""
    return (prompt.turns, prompt.text) if prompt.turns or prompt.text else None


def figures(rows: HeldOut, scores: Tensor, lengths: Tensor) -> dict[str, float]:
    """All figures by their metric names. scores, lengths (tokens): one for each of ``rows.items``; a score that is not
    finite could not be given, and its pairs are left out and counted. A figure that does not exist is left out."""
    usable = scores[rows.better].isfinite() & scores[rows.worse].isfinite()
    better, worse, cluster = rows.better[usable], rows.worse[usable], rows.cluster[usable]
    margins = scores[better].double() - scores[worse].double()
    finite = scores.isfinite()
    accuracy = ranking.pair_accuracy(margins, cluster)
    found = {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_error": accuracy.error,
        "eval/margin": float(margins.mean()) if len(margins) else float("nan"),
        "eval/score_mean": float(scores[finite].double().mean()) if bool(finite.any()) else float("nan"),
        "eval/length_accuracy": ranking.rule_accuracy(lengths[better], lengths[worse]),
        "eval/length_correlation": ranking.correlation(scores[finite], lengths[finite]),
        "eval/pairs": float(len(margins)),
        "eval/unscorable_pairs": float((~usable).sum()),
        **_calibration(margins),
        **_position(rows, usable),
        **_auc(rows, scores),
    }
    return {name: value for name, value in found.items() if value == value}


def _calibration(margins: Tensor) -> dict[str, float]:
    buckets = ranking.confidence_buckets(margins, len(CONFIDENCE))
    found = {"eval/calibration_error": ranking.calibration_error(buckets)}
    for name, bucket in zip(CONFIDENCE, buckets, strict=False):
        found[f"eval/accuracy/{name}"] = bucket.accuracy
        found[f"eval/confidence/{name}"] = bucket.confidence
    return found


def _position(rows: HeldOut, usable: Tensor) -> dict[str, float]:
    """The rule "prefer what was shown first", where rows say what was."""
    said = [pair.prompt.columns.get(SHOWN_FIRST) for pair in rows.pairs]
    known = torch.tensor(
        [bool(first) for first, ok in zip(said, usable.tolist(), strict=True) if ok and first is not None]
    )
    return {"eval/position_accuracy": float(known.double().mean())} if len(known) else {}


def _auc(rows: HeldOut, scores: Tensor) -> dict[str, float]:
    positive, negative = scores[rows.positive], scores[rows.negative]
    found = ranking.auc(positive[positive.isfinite()], negative[negative.isfinite()])
    return {"eval/auc": found.value, "eval/auc_error": found.error}


def by_category(rows: HeldOut, scores: Tensor, column: str) -> dict[str, tuple[int, ranking.Estimate]]:
    """Value of a column of the rows → (pairs, accuracy with its error), in order of first appearance."""
    usable = (scores[rows.better].isfinite() & scores[rows.worse].isfinite()).tolist()
    members: dict[str, list[int]] = {}
    for index, pair in enumerate(rows.pairs):
        if usable[index]:
            members.setdefault(str(pair.prompt.columns.get(column)), []).append(index)
    margins = scores[rows.better].double() - scores[rows.worse].double()
    return {
        name: (len(chosen), ranking.pair_accuracy(margins[chosen], rows.cluster[chosen]))
        for name, chosen in members.items()
    }
