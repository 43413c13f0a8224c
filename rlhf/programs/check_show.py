"""How ``rlhf check`` shows rows and tokens. Texts of others are escaped: they cannot drive the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf.data.examples import Demonstration, Preference
from rlhf.data.load import SourceReport
from rlhf.models.chat import stop_ids
from rlhf.programs.evaluation import shown
from rlhf.rollout import Prompt
from rlhf.tracking.console import printable

_LABEL_WIDTH = 11
_INDENT = " " * _LABEL_WIDTH
_SHOWN_TOKENS = 120  # of a prompt or a completion: its beginning and its end
_QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
_COUNTING = {
    "prompts": "the policy goes on from here",
    "demonstrations": "those in [brackets] count in the loss",
    "preferences": "[chosen] or [rejected], each scored at its last token",
}
_SPECIAL, _COUNTS = "cyan", "underline"


def printer() -> Callable[[str, str | Text], None]:
    """Prints one line under a label; a label that comes again is left out."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    last = [""]

    def out(label: str, line: str | Text) -> None:
        text = line if isinstance(line, Text) else Text(printable(line, newlines=False))
        first = label if label != last[0] else ""
        last[0] = label
        console.print(Text(f"{first:<{_LABEL_WIDTH}}") + text)

    return out


def counts(name: str, report: SourceReport, *, cut: bool) -> Iterator[str]:
    """What became of a source's rows. cut: it may have more rows than were looked at."""
    more = f" (the first {report.read}; --rows looks at more)" if cut else ""
    yield f"{name} {report.source.path}: {report.used} of {report.read} rows used as {report.format}{more}"
    for line in report.dropped.lines():
        yield f"  dropped: {line}"


def example(
    tokenizer: Any,
    kind: str,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    counted: Sequence[Sequence[bool]],
) -> Text:
    """The first example, token by token: prompt tokens as they are, tokens that count (``counted``) in [brackets]."""
    text = Text(f"tokens are split by |; {_COUNTING[kind]}\n{_INDENT}") + _tokens(tokenizer, prompt, counts=False)
    for index, (ids, marks) in enumerate(zip(completions, counted, strict=True)):
        if index:
            text += Text(f"\n{_INDENT}or: ")
        for counts, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
            text += _tokens(tokenizer, [token for token, _ in run], counts=counts)
    return text


def as_text(row: Prompt | Demonstration | Preference) -> str:
    """An example as it stands in the data, where there is no tokenizer to show its tokens."""
    if isinstance(row, Prompt):
        return shown(row)
    replies = (row.completion,) if isinstance(row, Demonstration) else (row.chosen, row.rejected)
    return f"{shown(row.prompt)} [{']  or: ['.join(replies)}]"


def special_tokens(tokenizer: Any, path: str | None) -> Iterator[str]:
    """The tokens that begin, end and pad, and every id that ends a completion."""
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    known = [f"{name} {_piece(tokenizer, token)} ({token})" for name, token in named.items() if token is not None]
    missing = [name for name in ("bos", "eos") if named[name] is None]
    yield ", ".join([*known, *(f"no {name}" for name in missing)])
    ends = stop_ids(tokenizer, _generation_config(path))
    yield f"a completion ends at {', '.join(f'{_piece(tokenizer, token)} ({token})' for token in ends) or 'nothing'}"


def bos(tokenizer: Any, ids: Sequence[int]) -> str:
    """How many BOS tokens the first example has: models are trained on one."""
    if tokenizer.bos_token_id is None:
        return "the tokenizer has none"
    return f"{list(ids).count(tokenizer.bos_token_id)} in the first example"


def lengths(
    key: str, kind: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Quantiles of the token counts, special tokens included."""
    for name, rows in (("prompts", prompts), ("replies" if kind == "preferences" else "completions", completions)):
        if rows:
            yield f"{key} {name:<12}{quantiles([len(row) for row in rows])}"


def quantiles(values: Sequence[int]) -> str:
    """``p50 12  p90 15  p99 17  max 20 tokens`` by nearest rank: each is the length of some row."""
    ordered = sorted(values)
    found = [f"{name} {ordered[max(math.ceil(q * len(ordered)), 1) - 1]}" for name, q in _QUANTILES]
    return f"{'  '.join(found)} tokens"


def _tokens(tokenizer: Any, ids: Sequence[int], *, counts: bool) -> Text:
    """Pieces split by | or, where they count, each in brackets; the middle of a long row is left out."""
    half = _SHOWN_TOKENS // 2
    left_out = max(len(ids) - _SHOWN_TOKENS, 0)
    visible = list(ids) if not left_out else [*ids[:half], None, *ids[-half:]]
    special = set(tokenizer.all_special_ids)
    text = Text()
    for index, token in enumerate(visible):
        if token is None:
            text.append(f" … {left_out} more … ")
            continue
        piece = printable(_piece(tokenizer, token), newlines=False)
        style = " ".join(part for part in (_SPECIAL if token in special else "", _COUNTS if counts else "") if part)
        text.append("[" if counts else "|" if index else "")
        text.append(piece, style=style or None)
        text.append("]" if counts else "")
    return text


def _piece(tokenizer: Any, token: int) -> str:
    """The text of one token, with the space that SentencePiece's decoder would strip."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    raw = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text


def _generation_config(path: str | None) -> Any:
    """The model's own, which may name further stop tokens; None where there is none."""
    from transformers import GenerationConfig

    try:
        return None if path is None else GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):
        return None
