"""Rows of any shape → prompts, demonstrations, preferences. Every row is checked; one that cannot be used is counted.

| format     | columns                                                                                     |
|------------|---------------------------------------------------------------------------------------------|
| messages   | ``messages``: a conversation                                                                |
| preference | ``chosen``, ``rejected`` and usually ``prompt``; without it, the turns that both share      |
| completion | ``prompt``, ``completion``                                                                  |
| prompt     | ``prompt``                                                                                  |
| text       | ``text`` and, for preferences, ``label`` (1/0, pos/neg, positive/negative, true/false)      |

A prompt or reply is a string or a list of ``{"role", "content"}``. Strings are plain text that no chat template touches
(TRL's convention), unless the other side is a list; ``format: chat`` takes a string prompt as one user turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from rlhf.data.dropped import Dropped, Where, row_number
from rlhf.data.examples import Demonstration, Preference
from rlhf.data.order import epoch_permutation
from rlhf.errors import UserError
from rlhf.rollout import Prompt, Turn

Row = Mapping[str, Any]
T = TypeVar("T")

# Looked for in this order: a preference row may well hold a `messages` column too.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "text": ("text",),
}
FORMATS = ("auto", "chat", *_COLUMNS)
_OWN_COLUMNS = {"messages", "prompt", "chosen", "rejected", "completion", "text"}
_LABELS = {"1": True, "true": True, "pos": True, "positive": True, "0": False, "false": False}
_LABELS |= {"neg": False, "negative": False}


class BadRow(Exception):
    """Why one row cannot be used; caught here and counted."""


def detect(rows: Sequence[Row], name: str = "auto") -> str:
    """The format of the rows: ``name`` itself, or the first one that more than half of the rows have the columns of.

    Raises UserError for an unknown name, for columns that fit no format, and for a named format whose columns are
    absent.
    """
    if name not in FORMATS:
        raise UserError(f"data format {name!r} is not known; set data.*.format to one of {', '.join(FORMATS)}")
    candidates = _COLUMNS if name in ("auto", "chat") else {name: _COLUMNS[name]}
    for found, needed in candidates.items():
        if 2 * sum(all(column in row for column in needed) for row in rows) > len(rows) or not rows:
            return found
    columns = {column for row in rows for column in row}
    wanted = " or ".join(" + ".join(needed) for needed in candidates.values())
    raise UserError(
        f"the data has columns {sorted(columns)}, and {wanted} would be needed; "
        "rename them with data.*.columns, for example {prompt: question}"
    )


def to_prompts(
    rows: Sequence[Row],
    *,
    format: str = "auto",
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
    kind = detect(rows, format)
    if kind == "text" and (prompt_tokens is None or tokenizer is None):
        raise UserError(
            "rows of plain text have no prompt; set data.prompt_tokens to the number of first tokens that are it"
        )

    def convert(row: Row, row_id: int) -> Prompt:
        if kind == "text":
            assert prompt_tokens is not None
            return Prompt(row_id=row_id, text=_cut(tokenizer, _text(row), prompt_tokens), columns=_other_columns(row))
        if kind == "preference":
            return _preference(row, row_id, format).prompt
        if kind == "messages":
            turns = _turns(row["messages"], "messages")
            return _conversation(turns[:-1] if turns[-1].role == "assistant" else turns, row, row_id)
        return _prompt(row["prompt"], row, row_id, format)

    return _converted(rows, convert, dropped, first_row_id, where)


def to_demonstrations(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    dropped: Dropped | None = None,
    first_row_id: int = 0,
    where: Where = row_number,
) -> list[Demonstration]:
    """Completions to imitate: the last assistant turn, the ``completion``, the chosen reply, or the plain text."""
    kind = detect(rows, format)
    if kind == "prompt":
        raise UserError(
            "the rows have prompts and no replies to imitate; give rows with messages, prompt + completion or text"
        )

    def convert(row: Row, row_id: int) -> Demonstration:
        if kind == "text":
            return Demonstration(Prompt(row_id=row_id, columns=_other_columns(row)), _text(row))
        if kind == "preference":
            preference = _preference(row, row_id, format)
            return Demonstration(preference.prompt, preference.chosen)
        if kind == "messages":
            history, reply = _split_reply(_turns(row["messages"], "messages"), "messages")
            return Demonstration(_conversation(history, row, row_id), reply)
        prompt, reply = _reply(row["prompt"], row["completion"], "completion", row, row_id, format)
        return Demonstration(prompt, reply)

    return _converted(rows, convert, dropped, first_row_id, where)


def to_preferences(
    rows: Sequence[Row],
    *,
    seed: int = 0,
    epoch: int = 0,
    format: str = "auto",
    dropped: Dropped | None = None,
    first_row_id: int = 0,
    where: Where = row_number,
) -> list[Preference]:
    """Pairs to compare. Labelled text gives positive over negative, prompts empty; pairs are drawn by (seed, epoch),
    each row is in one pair per epoch, and of the larger class some rows wait for another epoch."""
    kind = detect(rows, format)
    if kind == "text":
        return _paired(_labelled(rows, dropped, first_row_id, where), seed, epoch)
    if kind != "preference":
        raise UserError(
            f"the rows have the columns of format {kind!r} and nothing to compare; give rows with chosen + rejected, "
            "or text with a label"
        )
    return _converted(rows, lambda row, row_id: _preference(row, row_id, format), dropped, first_row_id, where)


def to_labelled(
    rows: Sequence[Row], *, dropped: Dropped | None = None, first_row_id: int = 0, where: Where = row_number
) -> list[Demonstration]:
    """All labelled texts, unpaired, with ``prompt.columns["label"]`` True for positive."""
    return _labelled(rows, dropped, first_row_id, where)


def texts(row: Row) -> list[str]:
    """Every piece of text in a row, for training a tokenizer; whatever is not text is skipped."""
    found: list[str] = []
    for column in ("messages", "prompt", "chosen", "rejected", "completion", "text"):
        value = row.get(column)
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            contents = [turn.get("content") for turn in value if isinstance(turn, Mapping)]
            found += [content for content in contents if isinstance(content, str)]
    return found


def _converted(
    rows: Sequence[Row], convert: Callable[[Row, int], T], dropped: Dropped | None, first_row_id: int, where: Where
) -> list[T]:
    done: list[T] = []
    for index, row in enumerate(rows):
        try:
            done.append(convert(row, first_row_id + index))
        except BadRow as bad:
            if dropped is not None:
                dropped.add(str(bad), where(first_row_id + index))
        except KeyError as missing:  # a column that the first row had and this one lacks
            if dropped is not None:
                dropped.add(f"no column {missing}", where(first_row_id + index))
    return done


# Conversations


def _turns(value: Any, column: str) -> tuple[Turn, ...]:
    """A checked conversation: known roles, text in every turn, system first, user and assistant in turns."""
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"{column} is not a list of turns")
    turns = tuple(_turn(item, column) for item in value)
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        raise BadRow(f"{column}: a system turn after the first one")
    if any(first == second for first, second in pairwise(talk)):
        raise BadRow(f"{column}: the same role twice in a row")
    if not talk:
        raise BadRow(f"{column} has nothing but a system turn")
    return turns


def _turn(item: Any, column: str) -> Turn:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise BadRow(f"{column}: a turn without role and content")
    role, content = item["role"], item["content"]
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"{column}: role {role!r} is not system, user or assistant")
    if not isinstance(content, str):
        raise BadRow(f"{column}: content is not text")
    if not content.strip():
        raise BadRow(f"{column}: an empty turn")
    return Turn(role=role, content=content)


def _conversation(turns: Sequence[Turn], row: Row, row_id: int) -> Prompt:
    if not turns or turns[-1].role != "user":
        raise BadRow("the prompt does not end with a user turn")
    if next(turn.role for turn in turns if turn.role != "system") != "user":
        raise BadRow("the conversation does not start with a user turn")
    return Prompt(row_id=row_id, turns=tuple(turns), columns=_other_columns(row))


def _prompt(value: Any, row: Row, row_id: int, format: str) -> Prompt:
    if not isinstance(value, str):
        return _conversation(_turns(value, "prompt"), row, row_id)
    if not value.strip():
        raise BadRow("the prompt is empty")
    if format == "chat":
        return _conversation((Turn(role="user", content=value),), row, row_id)
    return Prompt(row_id=row_id, text=value, columns=_other_columns(row))


def _split_reply(turns: Sequence[Turn], column: str) -> tuple[tuple[Turn, ...], str]:
    if turns[-1].role != "assistant":
        raise BadRow(f"{column} does not end with an assistant turn")
    return tuple(turns[:-1]), turns[-1].content


def _reply(prompt: Any, value: Any, column: str, row: Row, row_id: int, format: str) -> tuple[Prompt, str]:
    """One reply and the prompt it answers. A reply given as turns may repeat the prompt's turns."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{column} is empty")
        return _prompt(prompt, row, row_id, format), value
    history, text = _split_reply(_turns(value, column), column)
    if isinstance(prompt, str) or prompt is None:
        asked = history or ((Turn(role="user", content=prompt),) if prompt else ())
        return _conversation(asked, row, row_id), text
    given = _turns(prompt, "prompt")
    if history not in ((), given):
        raise BadRow(f"prompt and {column} disagree about the turns before the reply")
    return _conversation(given, row, row_id), text


# Preferences


def _preference(row: Row, row_id: int, format: str) -> Preference:
    if row.get("prompt") is None and isinstance(row["chosen"], str):
        raise BadRow("no prompt, and chosen is plain text: what they share cannot be told apart")
    prompt, chosen = _reply(row.get("prompt"), row["chosen"], "chosen", row, row_id, format)
    other, rejected = _reply(row.get("prompt"), row["rejected"], "rejected", row, row_id, format)
    if (prompt.turns, prompt.text) != (other.turns, other.text):
        raise BadRow("chosen and rejected answer different conversations")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    margin = _margin(row)
    if margin is not None and margin <= 0:
        raise BadRow("chosen is not rated above rejected")
    return Preference(prompt, chosen, rejected, margin)


def _margin(row: Row) -> float | None:
    if row.get("margin") is not None:
        return _number(row["margin"], "margin")
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return None
    return _number(row["score_chosen"], "score_chosen") - _number(row["score_rejected"], "score_rejected")


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{column} is not a number")
    return float(value)


# Plain text


def _text(row: Row) -> str:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise BadRow("text is empty or not a string")
    return text


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The text of the first ``tokens`` tokens. It must stand for exactly these tokens, or the prompt that the policy
    sees would have another length than the recipe says (a cut inside a character is the usual case)."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= tokens:
        raise BadRow(f"text has no more than {tokens} tokens")
    kept = str(tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False))
    if tokenizer.encode(kept, add_special_tokens=False) != ids[:tokens]:
        raise BadRow("the cut text encodes to other tokens")
    return kept


def _labelled(rows: Sequence[Row], dropped: Dropped | None, first_row_id: int, where: Where) -> list[Demonstration]:
    """Each text with its label as ``prompt.columns["label"]``, True for positive."""

    def convert(row: Row, row_id: int) -> Demonstration:
        label = _LABELS.get(str(row["label"]).strip().lower())
        if label is None:
            raise BadRow("label is neither positive (1, pos, true) nor negative (0, neg, false)")
        return Demonstration(Prompt(row_id=row_id, columns={"label": label}), _text(row))

    return _converted(rows, convert, dropped, first_row_id, where)


def _paired(examples: Sequence[Demonstration], seed: int, epoch: int) -> list[Preference]:
    sides = {
        label: [example for example in examples if example.prompt.columns["label"] is label] for label in (True, False)
    }
    winners = epoch_permutation(len(sides[True]), seed, 2 * epoch)
    losers = epoch_permutation(len(sides[False]), seed, 2 * epoch + 1)
    return [
        Preference(replace(sides[True][w].prompt, columns={}), sides[True][w].completion, sides[False][v].completion)
        for w, v in zip(winners.tolist(), losers.tolist(), strict=False)
    ]


def _other_columns(row: Row, own: Collection[str] = frozenset(_OWN_COLUMNS)) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in own}
