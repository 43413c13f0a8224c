"""Rows of any format → prompts, demonstrations, preferences. Every row is checked; one that cannot be used is counted.

Strings are plain text that no chat template touches (TRL's convention), unless the other side is a list;
``format: chat`` takes a string prompt as one user turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.dropped import Dropped, Where, row_number
from rlhf.data.examples import Demonstration, Preference
from rlhf.data.formats.common import PlainText, labelled
from rlhf.data.formats.format import Asked, BadRow, Format, Pair, Reply, Row, Rows, each
from rlhf.data.formats.table import find, require
from rlhf.data.formats.turns import user
from rlhf.errors import UserError
from rlhf.models.chat import decode_texts, encode_texts
from rlhf.rollout import Prompt


def to_prompts(
    rows: Sequence[Row],
    *,
    format: str | Format = "auto",
    dropped: Dropped | None = None,
    tokenizer: Any = None,
    prompt_tokens: int | None = None,
    first_row_id: int = 0,
    where: Where = row_number,
) -> list[Prompt]:
    """What completions are sampled for, from rows of any format; replies in the rows are left out.

    Plain text (``text``) is cut: its first ``prompt_tokens`` tokens are the prompt, and rows with no token after them,
    or whose cut text does not encode to the same tokens again, are dropped. ``row_id`` is ``first_row_id`` + position.
    """
    take = _Take.of(rows, format, dropped, first_row_id, where)
    require(take.format, "prompts")
    if take.format.cut and (prompt_tokens is None or tokenizer is None):
        raise UserError(
            "rows of plain text have no prompt; set data.prompt_tokens to the number of first tokens that are it"
        )
    found = take.format.prompts(take.rows, take.drop)
    if take.format.cut and prompt_tokens is not None:
        found = _cut(found, tokenizer, prompt_tokens, take)
    return [take.prompt(row_id, asked) for row_id, asked in found]


def to_demonstrations(
    rows: Sequence[Row],
    *,
    format: str | Format = "auto",
    dropped: Dropped | None = None,
    first_row_id: int = 0,
    where: Where = row_number,
) -> list[Demonstration]:
    """Completions to imitate: the last assistant turn, the ``completion``, the chosen reply, or the plain text."""
    take = _Take.of(rows, format, dropped, first_row_id, where)
    require(take.format, "demonstrations")
    replies = each(take.rows, take.format.demonstration, take.drop)
    return [Demonstration(take.prompt(row_id, reply.asked), reply.completion) for row_id, reply in replies]


def to_preferences(
    rows: Sequence[Row],
    *,
    seed: int = 0,
    epoch: int = 0,
    format: str | Format = "auto",
    dropped: Dropped | None = None,
    first_row_id: int = 0,
    where: Where = row_number,
) -> list[Preference]:
    """Pairs to compare. Labelled text gives positive over negative, prompts empty; pairs are drawn by (seed, epoch),
    each row is in one pair per epoch, and of the larger class some rows wait for another epoch."""
    take = _Take.of(rows, format, dropped, first_row_id, where)
    require(take.format, "preferences")
    pairs = take.format.preferences(take.rows, take.drop, seed, epoch)
    return [
        Preference(take.prompt(row_id, pair.asked), pair.chosen, pair.rejected, pair.margin) for row_id, pair in pairs
    ]


def texts(row: Row, format: Format | None = None) -> list[str]:
    """Every piece of text in a row, for training a tokenizer; a row that cannot be used has none."""
    chosen = find([row]) if format is None else format
    for convert in (chosen.preference, chosen.demonstration, chosen.prompt):
        try:
            found: Pair | Reply | Asked = convert(row)
        except (BadRow, KeyError, NotImplementedError):
            continue
        asked, replies = _pieces(found)
        before = [asked] if isinstance(asked, str) else [turn.content for turn in asked]
        return [text for text in (*before, *replies) if text]
    return []


def to_labelled(rows: Sequence[Row], *, format: str = "auto") -> list[Demonstration]:
    """All labelled texts, unpaired, with ``prompt.columns["label"]`` True for positive; none where rows have another
    format, and rows without a label are left out."""
    if find(rows, format).name != PlainText.name:
        return []
    found = each(list(enumerate(rows)), labelled, lambda row_id, reason: None)
    return [Demonstration(Prompt(row_id=row_id, columns={"label": label}), text) for row_id, (label, text) in found]


def _pieces(found: Pair | Reply | Asked) -> tuple[Asked, tuple[str, ...]]:
    if isinstance(found, Pair):
        return found.asked, (found.chosen, found.rejected)
    return (found.asked, (found.completion,)) if isinstance(found, Reply) else (found, ())


@dataclass(frozen=True)
class _Take:
    """Rows with their ids and their format, on the way to becoming examples."""

    rows: Rows
    format: Format
    dropped: Dropped | None
    first: int
    where: Where

    @classmethod
    def of(cls, rows: Sequence[Row], format: str | Format, dropped: Dropped | None, first: int, where: Where) -> _Take:
        chosen = find(rows, format) if isinstance(format, str) else format
        return cls(list(enumerate(rows, start=first)), chosen, dropped, first, where)

    def drop(self, row_id: int, reason: str) -> None:
        if self.dropped is not None:
            self.dropped.add(reason, self.where(row_id))

    def prompt(self, row_id: int, asked: Asked) -> Prompt:
        columns = self.format.extras(self.rows[row_id - self.first][1])
        if isinstance(asked, str) and not (self.format.chat and not self.format.cut):
            return Prompt(row_id=row_id, text=asked, columns=columns)
        return Prompt(row_id=row_id, turns=user(asked) if isinstance(asked, str) else asked, columns=columns)


def _cut(found: Iterable[tuple[int, Asked]], tokenizer: Any, tokens: int, take: _Take) -> Iterator[tuple[int, Asked]]:
    """The text of the first ``tokens`` tokens. It must stand for exactly these tokens, or the prompt that the policy
    sees would have another length than the recipe says (a cut inside a character is the usual case)."""
    whole = [(row_id, text) for row_id, text in found if isinstance(text, str)]
    kept: list[tuple[int, list[int]]] = []
    for (row_id, _), ids in zip(whole, _first_ids(tokenizer, [text for _, text in whole], tokens), strict=True):
        if len(ids) <= tokens:
            take.drop(row_id, f"text has no more than {tokens} tokens")
        else:
            kept.append((row_id, ids[:tokens]))
    cuts = decode_texts(tokenizer, [ids for _, ids in kept])
    for (row_id, wanted), cut, ids in zip(kept, cuts, encode_texts(tokenizer, cuts), strict=True):
        if ids == wanted:
            yield row_id, cut
        else:
            take.drop(row_id, "the cut text encodes to other tokens")


def _first_ids(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Ids of each text, at least the first ``tokens`` and one more where it has them. A long text is encoded as far as
    is surely enough: what stands far behind the cut has no say in the tokens before it."""
    enough = 6 * tokens + 48  # characters
    found = encode_texts(tokenizer, [text[:enough] for text in texts])
    short = [at for at, text in enumerate(texts) if len(text) > enough and len(found[at]) <= tokens + 8]
    for at, ids in zip(short, encode_texts(tokenizer, [texts[at] for at in short]), strict=True):
        found[at] = ids
    return found
