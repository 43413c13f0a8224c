"""Conversations in rows, checked: what a chat template would refuse, or read differently, is a bad row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlhf.data.formats.format import Asked, BadRow, Reply
from rlhf.rollout import Turn


def turns_of(value: Any, column: str) -> tuple[Turn, ...]:
    """A list of ``{"role", "content"}``: known roles, text in every turn, system first, user and assistant in turns."""
    if value is None:
        raise BadRow(f"no column {column!r}")  # tables fill in None where other rows have a value
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"{column} is not a list of turns")
    return alternating([_turn(item, column) for item in value], column)


def alternating(turns: Sequence[Turn], column: str) -> tuple[Turn, ...]:
    """The same turns, if they are a conversation."""
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in talk:
        raise BadRow(f"{column}: a system turn after the first one")
    if any(first == second for first, second in pairwise(talk)):
        raise BadRow(f"{column}: the same role twice in a row")
    if not talk:
        raise BadRow(f"{column} has nothing but a system turn")
    return tuple(turns)


def turn(role: Any, content: Any, column: str) -> Turn:
    """One message. Raises BadRow for a role that no template knows, and for a turn without text."""
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"{column}: role {role!r:.40} is not system, user or assistant")
    if not isinstance(content, str):
        raise BadRow(f"{column}: content is not text")
    if not content.strip():
        raise BadRow(f"{column}: an empty turn")
    return Turn(role=role, content=content)


def question(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """A conversation that waits for an assistant's turn."""
    if not turns or turns[-1].role != "user":
        raise BadRow("the prompt does not end with a user turn")
    if turns[turns[0].role == "system"].role != "user":
        raise BadRow("the conversation does not start with a user turn")
    return tuple(turns)


def user(text: str) -> tuple[Turn, ...]:
    """A conversation of one question."""
    return (Turn(role="user", content=text),)


def split_reply(turns: Sequence[Turn], column: str) -> tuple[tuple[Turn, ...], str]:
    """Everything before the last assistant turn, and that turn's text."""
    if turns[-1].role != "assistant":
        raise BadRow(f"{column} does not end with an assistant turn")
    return tuple(turns[:-1]), turns[-1].content


def before_the_reply(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The prompt of a whole conversation: all of it where nobody has replied yet."""
    return question(turns[:-1] if turns[-1].role == "assistant" else turns)


def last_reply(turns: Sequence[Turn], column: str) -> Reply:
    """The last assistant turn of a conversation, and what it answers."""
    history, completion = split_reply(turns, column)
    return Reply(question(history), completion)


def asked(value: Any) -> Asked:
    """A prompt column: a string is plain text, a list is a conversation."""
    if not isinstance(value, str):
        return question(turns_of(value, "prompt"))
    if not value.strip():
        raise BadRow("the prompt is empty")
    return value


def reply_to(prompt: Any, value: Any, column: str) -> Reply:
    """A reply column and the prompt column it answers. A reply given as turns may repeat the prompt's turns, and makes
    a conversation of a prompt that is a string."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{column} is empty")
        return Reply(asked(prompt), value)
    history, text = split_reply(turns_of(value, column), column)
    if isinstance(prompt, str) or prompt is None:
        return Reply(question(history or (user(prompt) if prompt else ())), text)
    given = turns_of(prompt, "prompt")
    if history not in ((), given):
        raise BadRow(f"prompt and {column} disagree about the turns before the reply")
    return Reply(question(given), text)


def _turn(item: Any, column: str) -> Turn:
    if not isinstance(item, dict | Mapping) or "role" not in item or "content" not in item:
        raise BadRow(f"{column}: a turn without role and content")
    return turn(item["role"], item["content"], column)
