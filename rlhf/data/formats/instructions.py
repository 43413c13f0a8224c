"""Instruction data as people bring it: ShareGPT, Alpaca, GSM8K. Their requests become user turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlhf.data.formats.format import Asked, BadRow, Format, Reply, Row, text_of
from rlhf.data.formats.turns import alternating, before_the_reply, last_reply, turn, user
from rlhf.rollout import Turn

_SHAREGPT_ROLES = {"human": "user", "user": "user", "system": "system"}
_SHAREGPT_ROLES |= dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bard", "bing"), "assistant")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"####\s*(\S.*)")


@dataclass(frozen=True)
class ShareGpt(Format):
    """``conversations``: turns of ``from`` (human, gpt, system) and ``value``, or of ``role`` and ``content``."""

    name: ClassVar[str] = "sharegpt"
    columns: ClassVar[tuple[str, ...]] = ("conversations",)

    def prompt(self, row: Row) -> Asked:
        return before_the_reply(self._turns(row))

    def demonstration(self, row: Row) -> Reply:
        return last_reply(self._turns(row), "conversations")

    def _turns(self, row: Row) -> tuple[Turn, ...]:
        value = row["conversations"]
        if not isinstance(value, list | tuple) or not value:
            raise BadRow("conversations is not a list of turns")
        return alternating([_sharegpt_turn(item) for item in value], "conversations")


@dataclass(frozen=True)
class Alpaca(Format):
    """``instruction``, ``input`` (may be empty), ``output``: instruction and input are one user turn, a blank line
    between them."""

    name: ClassVar[str] = "alpaca"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "output")
    also: ClassVar[tuple[str, ...]] = ("input",)

    def prompt(self, row: Row) -> Asked:
        instruction, given = text_of(row["instruction"], "instruction"), row.get("input") or ""
        if not isinstance(given, str):
            raise BadRow("input is not text")
        return user(f"{instruction}\n\n{given}" if given.strip() else instruction)

    def demonstration(self, row: Row) -> Reply:
        return Reply(self.prompt(row), text_of(row["output"], "output"))


@dataclass(frozen=True)
class Gsm8k(Format):
    """``question`` and ``answer`` that ends in ``#### 18``. Reward functions get the row's ``answer`` and, as
    ``final_answer``, the number alone; the calculator's ``<<48/2=24>>`` is not in the demonstration."""

    name: ClassVar[str] = "gsm8k"
    columns: ClassVar[tuple[str, ...]] = ("question", "answer")

    def recognises(self, row: Row) -> bool:
        return super().recognises(row) and isinstance(row["answer"], str) and "####" in row["answer"]

    def prompt(self, row: Row) -> Asked:
        _final(row)
        return user(text_of(row["question"], "question"))

    def demonstration(self, row: Row) -> Reply:
        return Reply(self.prompt(row), _CALCULATION.sub("", row["answer"]))

    def extras(self, row: Row) -> dict[str, Any]:
        return super().extras(row) | {"answer": row["answer"], "final_answer": _final(row)}


def _sharegpt_turn(item: Any) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow("conversations: a turn without from and value")
    if {"role", "content"} <= item.keys():
        return turn(item["role"], item["content"], "conversations")
    if not {"from", "value"} <= item.keys():
        raise BadRow("conversations: a turn without from and value")
    role = _SHAREGPT_ROLES.get(str(item["from"]).lower(), item["from"])
    return turn(role, item["value"], "conversations")


def _final(row: Row) -> str:
    """``1,080`` at the end of an answer → ``1080``."""
    found = _FINAL.findall(text_of(row["answer"], "answer"))
    if not found:
        raise BadRow("answer has no final number after ####")
    return str(found[-1]).strip().replace(",", "")
