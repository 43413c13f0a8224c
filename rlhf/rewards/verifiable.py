"""Rewards that need no model: the answer can be checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from rlhf.errors import UserError

_SECONDS = 5  # for one answer; a longer one is not an answer


def math_answer(
    completions: Sequence[Any],
    final_answer: Sequence[Any],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's final answer equals the row's ``final_answer``, else 0.0; None where that is none.

    Equality is mathematical (1/2 = 0.5 = \\frac{1}{2}), by the library math-verify (extra ``math``). The last number or
    formula of the completion counts, so ``#### 18``, ``\\boxed{18}`` and "the answer is 18" are read alike. Logs the
    share of completions with an answer that can be read.
    """
    parse, verify = _library()
    read = [parse(_text(completion)) for completion in completions]
    if log_metric is not None and read:
        log_metric("answered", sum(map(bool, read)) / len(read))
    known = {answer: parse(answer) for answer in map(str, final_answer)}
    return [
        float(bool(found) and verify(known[str(answer)], found)) if known[str(answer)] else None
        for found, answer in zip(read, final_answer, strict=True)
    ]


def _library() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(
            'math_answer needs the library math-verify; install it with pip install -e ".[math]"'
        ) from error
    # its time limit is a signal, and signals reach the main thread alone
    limit = _SECONDS if threading.current_thread() is threading.main_thread() else None
    return (
        lambda text: math_verify.parse(text, parsing_timeout=limit),
        lambda gold, found: bool(math_verify.verify(gold, found, timeout_seconds=limit)),
    )


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
