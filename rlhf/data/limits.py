"""Prompts that a tokenizer can render within the recipe's limits: system turns and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from rlhf.data.dropped import Dropped, Where, row_number
from rlhf.errors import UserError
from rlhf.models.chat import SystemRole, conversation_with_system, render_prompt, render_prompts, supports_system
from rlhf.rollout import Prompt, Turn

LongPrompts = Literal["drop", "truncate_left"]

_TOGETHER = 1024  # prompts that are tokenised in one call


def without_unsupported_system(prompts: Sequence[Prompt], tokenizer: Any, system_role: SystemRole) -> list[Prompt]:
    """System turns merged, dropped or refused where the tokenizer's template has none; untouched where it has one.

    Without a tokenizer (the template is not known yet) merge and drop are applied, and error is left to the rendering.
    """
    if not any(turn.role == "system" for prompt in prompts for turn in prompt.turns):
        return list(prompts)
    known = tokenizer is not None
    if (known and supports_system(tokenizer)) or (not known and system_role == "error"):
        return list(prompts)
    return [conversation_with_system(prompt, system_role) for prompt in prompts]


def within_length(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    max_tokens: int | None,
    long_prompts: LongPrompts,
    dropped: Dropped,
    where: Where = row_number,
) -> list[Prompt]:
    """The prompts whose rendering has at most ``max_tokens`` tokens, template and BOS included.

    Longer ones are dropped, or lose their beginning: whole turns first (a system turn stays), then the beginning of
    what is left of the text. Prompts that cannot be rendered are dropped too, with the reason.
    """
    kept: list[Prompt] = []
    for start in range(0, len(prompts), _TOGETHER):
        some = prompts[start : start + _TOGETHER]
        for prompt, ids in zip(some, render_prompts(tokenizer, some), strict=True):
            if isinstance(ids, UserError):
                if any(turn.role == "system" for turn in prompt.turns):
                    raise ids
                dropped.add("cannot be rendered", f"{where(prompt.row_id)}: {ids}")
                continue
            fits = max_tokens is None or len(ids) <= max_tokens
            if not fits and max_tokens is not None and long_prompts == "truncate_left":
                prompt, fits = _shortened(tokenizer, prompt, max_tokens)
            if fits:
                kept.append(prompt)
            else:
                dropped.add(f"prompt longer than {max_tokens} tokens", where(prompt.row_id))
    return kept


def _shortened(tokenizer: Any, prompt: Prompt, max_tokens: int) -> tuple[Prompt, bool]:
    """The prompt without its beginning, and whether it fits now."""
    system = tuple(turn for turn in prompt.turns if turn.role == "system")
    turns = prompt.turns[len(system) :]
    while len(turns) > 2 and len(render_prompt(tokenizer, replace(prompt, turns=system + turns))) > max_tokens:
        turns = turns[2:]  # a question and its answer go together: the conversation starts with a user turn
    shorter = replace(prompt, turns=system + turns) if prompt.conversational else prompt
    text = shorter.turns[-1].content if shorter.conversational else shorter.text
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = 0
    while (excess := len(render_prompt(tokenizer, shorter)) - max_tokens) > 0:
        cut += excess  # what is left may encode to more tokens than it was cut from, so look again
        if cut >= len(ids):
            return shorter, False
        rest = str(tokenizer.decode(ids[cut:], clean_up_tokenization_spaces=False))
        shorter = _with_last_text(shorter, rest.lstrip("\ufffd"))  # the bytes of a character cut in two
    return shorter, True


def _with_last_text(prompt: Prompt, text: str) -> Prompt:
    if not prompt.conversational:
        return replace(prompt, text=text)
    return replace(prompt, turns=(*prompt.turns[:-1], Turn(role=prompt.turns[-1].role, content=text)))
