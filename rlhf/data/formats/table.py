"""The table of formats, in the order in which they are looked for; finding the one that rows are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.data.formats.common import Completion, Messages, PlainText, Preference, PromptOnly
from rlhf.data.formats.feedback import HelpSteer, HhRlhf, Summaries, UltraFeedback
from rlhf.data.formats.format import Format, Row, Use
from rlhf.data.formats.instructions import Alpaca, Gsm8k, ShareGpt
from rlhf.errors import UserError
from rlhf.locate import named_code

# A row that fits several is of the first: a preference row may well hold a `messages` column too.
TABLE: tuple[Format, ...] = (
    HhRlhf(),
    Preference(),
    Summaries(),
    UltraFeedback(),
    Messages(),
    ShareGpt(),
    HelpSteer(),
    Completion(),
    Alpaca(),
    Gsm8k(),
    PromptOnly(),
    PlainText(),
)
FORMATS = ("auto", "chat", *(entry.name for entry in TABLE))

_LOOKED_AT = 1000  # rows, spread evenly: enough to know what most rows of a file are

_USES: dict[Use, tuple[str, str]] = {
    "prompts": ("no prompts", "sampling (reinforce and its family)"),
    "demonstrations": ("no replies to imitate", "sft and data.instruction"),
    "preferences": ("nothing to compare", "reward and dpo"),
}


def find(rows: Sequence[Row], name: str = "auto", origin: str = "the data") -> Format:
    """The format of the rows: the named one, or the first that recognises more than half of them.

    ``chat`` is found like ``auto``; ``package.module:Class`` is a ``Format`` of the caller's own. Raises UserError for
    an unknown name, for columns that fit no format, and for a named format whose columns are absent.
    """
    if name in ("auto", "chat"):
        for entry in TABLE:
            if not rows or _most(rows, entry, named=False):
                return replace(entry, chat=name == "chat")
        raise UserError(_fits_nothing(rows, TABLE, origin))
    chosen = _outside(name) if ":" in name else next((entry for entry in TABLE if entry.name == name), None)
    if chosen is None:
        known = f"{', '.join(FORMATS)}, or your own as package.module:Class"
        raise UserError(f"data format {name!r} is not known; set data.*.format to one of {known}")
    if rows and not _most(rows, chosen, named=True):
        raise UserError(_fits_nothing(rows, (chosen,), origin))
    return chosen


def detect(rows: Sequence[Row], name: str = "auto") -> str:
    """The name of the format that ``find`` finds."""
    return find(rows, name).name


def require(chosen: Format, use: Use, origin: str = "the data") -> None:
    """Raises UserError where rows of this format cannot serve, naming the formats that can."""
    if chosen.serves(use):
        return
    lacks, needed_by = _USES[use]
    able = ", ".join(str(entry) for entry in TABLE if entry.serves(use))
    raise UserError(
        f"{origin}: rows of format {chosen} have {lacks}, which {needed_by} cannot do without; formats that have it: "
        f"{able}; give such rows, or rename columns with data.*.columns"
    )


def _most(rows: Sequence[Row], entry: Format, *, named: bool) -> bool:
    """Whether more than half of the rows look like this format. A named one needs its columns only: what is wrong with
    their content is told row by row."""
    looked_at = rows[:: 1 + len(rows) // _LOOKED_AT]
    fits = (lambda row: Format.recognises(entry, row)) if named else entry.recognises
    return 2 * sum(map(fits, looked_at)) > len(looked_at)


def _outside(name: str) -> Format:
    made = named_code(name, "data.*.format")()
    if not isinstance(made, Format):
        raise UserError(
            f"data.*.format {name} is no rlhf.data.formats.Format ({type(made).__name__}); derive it from it"
        )
    return made


def _fits_nothing(rows: Sequence[Row], entries: Sequence[Format], origin: str) -> str:
    columns = sorted({str(column) for row in rows for column in row})
    wanted = " or ".join(" + ".join(entry.columns) for entry in entries)
    return (
        f"{origin} has columns {_short(columns)}, and {wanted} would be needed; "
        f"rename them with data.*.columns, for example {_example(columns, entries)}"
    )


def _example(columns: Sequence[str], entries: Sequence[Format]) -> str:
    """A rename that would help where a column differs by case alone."""
    lower = {column.lower().strip(): column for column in columns}
    close = {ours: lower[ours] for entry in entries for ours in entry.columns if ours in lower}
    pairs = [f"{ours}: {theirs}" for ours, theirs in close.items() if ours != theirs] or ["prompt: question"]
    return "{" + ", ".join(pairs) + "}"


def _short(columns: Sequence[str]) -> str:
    """A file whose header is data has hundreds of long columns."""
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    return f"{[column[:40] for column in columns[:12]]}{more}"
