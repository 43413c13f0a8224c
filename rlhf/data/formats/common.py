"""The formats whose columns are called what the toolkit calls them (TRL's names): messages, prompt, completion, …"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rlhf.data.formats.format import Asked, BadRow, Compared, Drop, Format, Pair, Reply, Row, Rows, better, each, number
from rlhf.data.formats.turns import asked, before_the_reply, last_reply, reply_to, turns_of
from rlhf.data.order import epoch_permutation

_LABELS = {"1": True, "true": True, "pos": True, "positive": True, "0": False, "false": False}
_LABELS |= {"neg": False, "negative": False}


@dataclass(frozen=True)
class Preference(Compared):
    """``prompt``, ``chosen``, ``rejected``. Without a prompt, the turns that both replies share are it. UltraFeedback
    as HuggingFaceH4 binarized it is this format: the difference of its ``score_*`` is the margin, ties are dropped."""

    name: ClassVar[str] = "preference"
    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def preference(self, row: Row) -> Pair:
        prompt = row.get("prompt")
        if prompt is None and isinstance(row["chosen"], str):
            raise BadRow("no prompt, and chosen is plain text: what they share cannot be told apart")
        chosen = reply_to(prompt, row["chosen"], "chosen")
        return better(chosen, reply_to(prompt, row["rejected"], "rejected"), _margin(row))


@dataclass(frozen=True)
class Messages(Format):
    """``messages``: a conversation whose last assistant turn is the reply."""

    name: ClassVar[str] = "messages"
    columns: ClassVar[tuple[str, ...]] = ("messages",)

    def prompt(self, row: Row) -> Asked:
        return before_the_reply(turns_of(row["messages"], "messages"))

    def demonstration(self, row: Row) -> Reply:
        return last_reply(turns_of(row["messages"], "messages"), "messages")


@dataclass(frozen=True)
class Completion(Format):
    """``prompt``, ``completion``. Strings are plain text, joined as they are, EOS after them (TL;DR: the completion
    brings the space that it starts with)."""

    name: ClassVar[str] = "completion"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def prompt(self, row: Row) -> Asked:
        return asked(row["prompt"])

    def demonstration(self, row: Row) -> Reply:
        return reply_to(row["prompt"], row["completion"], "completion")


@dataclass(frozen=True)
class PromptOnly(Format):
    """``prompt``, and nothing to learn from: completions are sampled."""

    name: ClassVar[str] = "prompt"
    columns: ClassVar[tuple[str, ...]] = ("prompt",)

    def prompt(self, row: Row) -> Asked:
        return asked(row["prompt"])


@dataclass(frozen=True)
class PlainText(Format):
    """``text``, and ``label`` for preferences: 1/0, pos/neg, positive/negative, true/false."""

    name: ClassVar[str] = "text"
    columns: ClassVar[tuple[str, ...]] = ("text",)
    cut: ClassVar[bool] = True

    def prompt(self, row: Row) -> Asked:
        return _text(row)

    def demonstration(self, row: Row) -> Reply:
        return Reply("", _text(row))

    def preferences(self, rows: Rows, drop: Drop, seed: int, epoch: int) -> Iterator[tuple[int, Pair]]:
        """Positive over negative, prompts empty. Pairs are drawn by (seed, epoch); each row is in one pair per epoch,
        and of the larger class some rows wait for another epoch."""
        sides: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for row_id, (label, text) in each(rows, labelled, drop):
            sides[label].append((row_id, text))
        if not (sides[True] and sides[False]):
            for row_id, _ in (*sides[True], *sides[False]):
                drop(row_id, "no text of the other label to compare with")
            return
        winners = epoch_permutation(len(sides[True]), seed, 2 * epoch)
        losers = epoch_permutation(len(sides[False]), seed, 2 * epoch + 1)
        for w, v in zip(winners.tolist(), losers.tolist(), strict=False):
            row_id, chosen = sides[True][w]
            yield row_id, Pair("", chosen, sides[False][v][1])


def _margin(row: Row) -> float | None:
    if row.get("margin") is not None:
        return number(row["margin"], "margin")
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    return number(row["score_chosen"], "score_chosen") - number(row["score_rejected"], "score_rejected")


def _text(row: Row) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise BadRow("text is empty or not a string")
    return text


def labelled(row: Row) -> tuple[bool, str]:
    """Whether a text is positive, and the text. Raises BadRow."""
    label = _LABELS.get(str(row["label"]).strip().lower())
    if label is None:
        raise BadRow("label is neither positive (1, pos, true) nor negative (0, neg, false)")
    return label, _text(row)
