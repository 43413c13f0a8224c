"""Human and model feedback as it was published: hh-rlhf, UltraFeedback, TL;DR comparisons, HelpSteer2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

from rlhf.data.formats.format import (
    Asked,
    BadRow,
    Compared,
    Drop,
    Format,
    Pair,
    Reply,
    Row,
    Rows,
    better,
    each,
    number,
    text_of,
)
from rlhf.data.formats.turns import alternating, last_reply, question, turn, user
from rlhf.rollout import Turn

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_STEERLM = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class HhRlhf(Compared):
    """Anthropic/hh-rlhf: ``chosen`` and ``rejected`` are transcripts of "Human:" and "Assistant:" that share all turns
    but the last. Real rows have one role twice in a row, empty turns and different histories: they are dropped."""

    name: ClassVar[str] = "hh_rlhf"
    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def recognises(self, row: Row) -> bool:
        sides = [row.get(column) for column in self.columns]
        return row.get("prompt") is None and all(isinstance(side, str) and _SPEAKER.match(side) for side in sides)

    def preference(self, row: Row) -> Pair:
        chosen, rejected = (last_reply(_transcript(row, column), column) for column in self.columns)
        return better(chosen, rejected, None)


@dataclass(frozen=True)
class UltraFeedback(Format):
    """openbmb/UltraFeedback: ``instruction`` and ``completions``, each a ``response`` with ratings. The best is over
    the worst, by the mean of the rated aspects; by ``overall_score`` only where no aspect is rated, because some of
    those published are wrong by a factor of ten."""

    name: ClassVar[str] = "ultrafeedback"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "completions")

    def prompt(self, row: Row) -> Asked:
        return user(text_of(row["instruction"], "instruction"))

    def demonstration(self, row: Row) -> Reply:
        return Reply(self.prompt(row), max(_rated(row), key=lambda entry: entry[0])[1])

    def preference(self, row: Row) -> Pair:
        rated = _rated(row)
        best, worst = max(rated, key=lambda entry: entry[0]), min(rated, key=lambda entry: entry[0])
        if best[0] == worst[0]:
            raise BadRow("all completions are rated the same")
        asked = self.prompt(row)
        return better(Reply(asked, best[1]), Reply(asked, worst[1]), best[0] - worst[0])


@dataclass(frozen=True)
class Summaries(Format):
    """openai/summarize_from_feedback, comparisons: ``info`` (a post or an article), two ``summaries``, ``choice``.
    Plain text: the prompt ends in "TL;DR:" and a summary starts with the space that the model has to write."""

    name: ClassVar[str] = "summaries"
    columns: ClassVar[tuple[str, ...]] = ("info", "summaries", "choice")

    def prompt(self, row: Row) -> Asked:
        return _to_summarize(row["info"])

    def demonstration(self, row: Row) -> Reply:
        pair = self.preference(row)
        return Reply(pair.asked, pair.chosen)

    def preference(self, row: Row) -> Pair:
        summaries, choice = row["summaries"], row["choice"]
        if not isinstance(summaries, list | tuple) or len(summaries) != 2:
            raise BadRow("summaries are not two")
        if isinstance(choice, bool) or choice not in (0, 1):
            raise BadRow("choice is neither 0 nor 1")
        asked = self.prompt(row)
        chosen, rejected = (Reply(asked, _summary(summaries[side])) for side in (choice, 1 - choice))
        return better(chosen, rejected, None)


@dataclass(frozen=True)
class HelpSteer(Format):
    """nvidia/HelpSteer2: ``prompt``, ``response`` and five ratings; the rows of one prompt follow each other. A pair is
    the most over the least helpful response to a prompt; each prompt is sampled for once."""

    name: ClassVar[str] = "helpsteer"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "response", "helpfulness")

    def prompt(self, row: Row) -> Asked:
        return _steerlm(text_of(row["prompt"], "prompt"))

    def demonstration(self, row: Row) -> Reply:
        return Reply(self.prompt(row), text_of(row["response"], "response"))

    def extras(self, row: Row) -> dict[str, Any]:
        return super().extras(row) | {"helpfulness": row["helpfulness"]}

    def prompts(self, rows: Rows, drop: Drop) -> Iterator[tuple[int, Asked]]:
        seen: set[Asked] = set()
        for row_id, asked in each(rows, self.prompt, drop):
            if asked in seen:
                drop(row_id, "another response to a prompt that came before")
            else:
                seen.add(asked)
                yield row_id, asked

    def preferences(self, rows: Rows, drop: Drop, seed: int, epoch: int) -> Iterator[tuple[int, Pair]]:
        rated: dict[Asked, list[tuple[int, float, str]]] = {}
        for row_id, (reply, score) in each(rows, self._rated, drop):
            rated.setdefault(reply.asked, []).append((row_id, score, reply.completion))
        groups = [(replies[0][0], {"asked": asked, "replies": replies}) for asked, replies in rated.items()]
        return each(groups, _best_over_worst, drop)

    def _rated(self, row: Row) -> tuple[Reply, float]:
        return self.demonstration(row), number(row["helpfulness"], "helpfulness")


def _transcript(row: Row, column: str) -> tuple[Turn, ...]:
    before, *parts = _SPEAKER.split(text_of(row[column], column))
    if before.strip() or not parts:
        raise BadRow(f"{column}: text before the first Human: or Assistant:")
    said = zip(parts[::2], parts[1::2], strict=True)
    return alternating([turn(_ROLES[speaker], text.strip(), column) for speaker, text in said], column)


def _rated(row: Row) -> list[tuple[float, str]]:
    """(score, response) of the completions that have both."""
    completions = row["completions"]
    if not isinstance(completions, list | tuple) or not all(isinstance(entry, Mapping) for entry in completions):
        raise BadRow("completions is not a list of responses with ratings")
    scored = [(_score(entry), entry.get("response")) for entry in completions]
    found = [(score, text) for score, text in scored if score is not None and isinstance(text, str) and text.strip()]
    if not found:
        raise BadRow("no completion has both a response and a rating")
    return found


def _score(completion: Mapping[str, Any]) -> float | None:
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else ()
    ratings = [aspect.get("Rating") for aspect in aspects if isinstance(aspect, Mapping)]
    given = [number(rating, "a rating") for rating in ratings if rating not in (None, "N/A")]
    overall = completion.get("overall_score")
    return mean(given) if given else None if overall is None else number(overall, "overall_score")


def _to_summarize(info: Any) -> str:
    if not isinstance(info, Mapping):
        raise BadRow("info is not an object")
    kind = "post" if info.get("post") else "article"
    if not isinstance(info.get(kind), str) or not info[kind].strip():
        raise BadRow("info has neither a post nor an article")
    head = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title"))]
    lines = [f"{label}{value.strip()}" for label, value in head if isinstance(value, str) and value.strip()]
    return "\n".join([*lines, f"{kind.upper()}: {info[kind].strip()}", "TL;DR:"])


def _summary(entry: Any) -> str:
    text = text_of(entry.get("text") if isinstance(entry, Mapping) else entry, "a summary")
    return f" {text.strip()}"


def _steerlm(text: str) -> tuple[Turn, ...]:
    """Later turns are written into the prompt, after marks of the format that its authors trained with."""
    first, *parts = _STEERLM.split(text)
    if not parts:
        return user(text)
    later = [turn(_ROLES[who], said.strip(), "prompt") for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return question(alternating([turn("user", first.strip(), "prompt"), *later], "prompt"))


def _best_over_worst(group: Row) -> Pair:
    replies: list[tuple[int, float, str]] = group["replies"]
    if len(replies) < 2:
        raise BadRow("the only response to its prompt: nothing to compare it with")
    best, worst = max(replies, key=lambda reply: reply[1]), min(replies, key=lambda reply: reply[1])
    if best[1] == worst[1]:
        raise BadRow("the responses to its prompt are rated the same")
    asked: Asked = group["asked"]
    return better(Reply(asked, best[2]), Reply(asked, worst[2]), best[1] - worst[1])
