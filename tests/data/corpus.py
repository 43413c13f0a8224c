"""Broken data files: what each is, how it is loaded, and the one line that says so (or the drop that counts it)."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any, Literal

from tests.data.test_files import table

Load = Literal["prompts", "demonstrations", "preferences"]

GOOD = {"prompt": "What is it?", "chosen": "It is blue.", "rejected": "No."}
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def lines(*rows: Any) -> bytes:
    """A JSONL file of rows, and of lines that are bytes or text already."""
    raw = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    return b"\n".join(raw) + b"\n"


@dataclass(frozen=True, kw_only=True)
class Broken:
    """``error``: a pattern of the whole message. ``drops``: reason → count beside the ``used`` examples."""

    id: str
    content: bytes
    name: str = "rows.jsonl"
    load: Load = "preferences"
    format: str = "auto"
    error: str | None = None
    drops: dict[str, int] | None = None
    used: int = 1


def refused(id: str, content: bytes, error: str, name: str = "rows.jsonl", **more: Any) -> Broken:
    return Broken(id=id, content=content, error=error, name=name, **more)


def counted(id: str, bad: Any, reason: str, **more: Any) -> Broken:
    """One bad row between two good ones (of the same columns, where ``good`` says which)."""
    good = more.pop("good", GOOD)
    return Broken(id=id, content=lines(good, bad, good), drops={reason: 1}, used=2, **more)


_PROMPT: dict[str, Any] = {"load": "prompts", "good": {"prompt": "What is it?"}}
_TALK: dict[str, Any] = {"load": "demonstrations", "good": {"messages": SAID}}

CORPUS = (
    # what the bytes are
    refused("empty", b"", "rows.jsonl has no usable row: it has no rows"),
    refused("only-blank-lines", b"\n\n  \n", "has no usable row: it has no rows"),
    refused("utf-16", lines(GOOD).decode().encode("utf-16"), "rows.jsonl is UTF-16; convert it to UTF-8"),
    refused("utf-16-without-mark", lines(GOOD).decode().encode("utf-16-le"), "begins with NUL bytes"),
    refused("latin-1", lines(GOOD, '{"prompt": "Gr\xfc\xdfe"}'.encode("latin-1")), r"rows\.jsonl:2 is not UTF-8"),
    refused("gzip-by-another-name", gzip.compress(lines(GOOD)), r"is gzip-compressed; let its name end in \.gz"),
    refused("no-gzip", lines(GOOD), "is no gzip file", name="rows.jsonl.gz"),
    refused("gzip-cut-off", gzip.compress(lines(*[GOOD] * 99))[:-9], "is cut off or damaged", name="rows.jsonl.gz"),
    refused("gzip-damaged", gzip.compress(lines(GOOD))[:-8] + b"12345678", "or is damaged", name="rows.jsonl.gz"),
    refused("gzip-twice", gzip.compress(gzip.compress(lines(GOOD))), "is gzip-compressed", name="rows.jsonl.gz"),
    refused("zip", b"PK\x03\x04" + bytes(40), "is a zip archive; unpack it"),
    refused("zstd", b"\x28\xb5\x2f\xfd" + bytes(40), "is zstd-compressed"),
    refused("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    refused("web-page", b"<!DOCTYPE html>\n<html></html>\n", "is a web page; download the file itself"),
    refused("parquet-by-another-name", table("parquet", [GOOD]), "is a parquet file; let its name end in .parquet"),
    refused("unknown-kind", b"prompt: a\n", r"files end in \.jsonl, .* or \.arrow; convert it", name="rows.txt"),
    # JSON
    counted("cut-off-line", '{"prompt": "What', "not valid JSON"),
    counted("nul-byte", b'{"prompt": "a\0b"}', "not valid JSON"),
    counted("nul-escape", GOOD | {"chosen": "a\0b"}, "a NUL character in the row"),
    counted(
        "half-a-surrogate",
        r'{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}',
        "half of a surrogate pair in the row",
    ),
    counted("nan", '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}', "NaN or Infinity in the row"),
    counted("key-twice", '{"prompt": "a", "prompt": "b", "chosen": "a"}', "a key comes twice in one object"),
    counted("huge-number", '{"prompt": "q", "margin": ' + "9" * 5000 + "}", "not valid JSON"),
    counted("deep-nesting", "[" * 100_000, "not valid JSON"),
    counted("a-list", ["prompt"], "not an object with named columns"),
    counted("thirty-megabytes", json.dumps({"prompt": "x" * 30_000_000}), "a line longer than 16 MiB"),
    refused("json-list-cut-off", b'[{"prompt": "a"},\n{"prom', r"rows\.json:2: not valid JSON", name="rows.json"),
    refused(
        "json-of-an-object", b'{\n"data": [],\n"v": 1}', r"one object with the keys \['data', 'v'\]", name="rows.json"
    ),
    refused("json-of-a-number", b"5", "rows.json holds int", name="rows.json"),
    refused("json-key-twice", b'[{"a": 1,\n"a": 2}]', "a key comes twice", name="rows.json"),
    # CSV
    refused("csv-header-twice", b"prompt,chosen,chosen\na,b,c\n", "names column 'chosen' more than once", name="r.csv"),
    Broken(
        id="csv-ragged",
        content=b"prompt,chosen,rejected\na,b\na,b,c\na,b,c,d\n",
        name="rows.csv",
        drops={"fewer cells than the header has columns": 1, "more cells than the header has columns": 1},
    ),
    refused("csv-open-quote", b'prompt,chosen\na,b\n"a,b\nc,d\n', r"rows\.csv:3: not valid CSV", name="rows.csv"),
    refused("csv-semicolons", b"prompt;chosen\na;b\n", "seems to be separated by ';'", name="rows.csv"),
    refused("csv-latin-1", "prompt\nGr\xfc\xdfe\n".encode("latin-1"), "rows.csv is not UTF-8", name="rows.csv"),
    refused("csv-only-header", b"prompt,chosen,rejected\n", "has no usable row: it has no rows", name="rows.csv"),
    refused(
        "csv-without-header", b"What is it?,It is blue.\nWho?,Me.\n", r"has columns \['It is blue", name="rows.csv"
    ),
    refused("tsv-with-commas", b"prompt,chosen\na,b\n", "seems to be separated by ','", name="rows.tsv"),
    refused("csv-cell-of-30-mb", b"prompt\n" + b"x" * 30_000_000, r"rows\.csv:2: not valid CSV", name="rows.csv"),
    # tables
    refused("no-parquet", lines(GOOD), "cannot be read as parquet", name="rows.parquet"),
    refused("parquet-cut-off", table("parquet", [GOOD] * 99)[:-20], "cannot be read as parquet", name="rows.parquet"),
    refused("no-arrow", lines(GOOD), "cannot be read as arrow", name="rows.arrow"),
    refused("arrow-cut-off", table("arrow", [GOOD] * 99)[:300], "cannot be read as arrow", name="rows.arrow"),
    Broken(
        id="parquet-with-nulls",
        content=table("parquet", [GOOD, GOOD | {"rejected": None}, GOOD | {"chosen": None}, GOOD, GOOD]),
        name="rows.parquet",
        drops={"no column 'rejected'": 1, "no column 'chosen'": 1},
        used=3,
    ),
    refused(
        "parquet-of-bytes",
        table("parquet", [{"prompt": b"a"}]),
        "prompt is not a list of turns",
        name="r.parquet",
        load="prompts",
    ),
    # columns
    refused("no-known-column", lines({"question": "a"}), r"rows\.jsonl has columns \['question'\]", load="prompts"),
    refused("other-case", lines({"Prompt": "a"}), r"for example \{prompt: Prompt\}", load="prompts"),
    refused("nothing-to-imitate", lines({"prompt": "a"}), r"rows\.jsonl: .* have no replies", load="demonstrations"),
    refused(
        "nothing-to-compare", lines({"prompt": "a", "completion": "b"}), r"rows\.jsonl: .* have nothing to compare"
    ),
    refused("text-without-length", lines({"text": "a b c"}), r"data\.prompt_tokens", load="prompts"),
    refused("text-without-label", lines({"text": "a"}, {"text": "b"}), "no usable row: no column 'label': 2"),
    refused("one-label", lines({"text": "a", "label": 1}), "no usable row: no text of the other label"),
    refused("unknown-format", lines(GOOD), "format 'sharegtp' is not known", format="sharegtp"),
    refused("format-not-there", lines(GOOD), "messages would be needed", format="messages"),
    refused("format-not-importable", lines(GOOD), "module nowhere cannot be imported", format="nowhere:Format"),
    # rows
    counted("chosen-is-rejected", GOOD | {"rejected": GOOD["chosen"]}, "chosen and rejected are the same"),
    counted("a-number-for-text", GOOD | {"chosen": 5}, "chosen is not a list of turns"),
    counted("column-missing", {"prompt": "q", "chosen": "a"}, "no column 'rejected'"),
    counted("empty-prompt", {"prompt": " "}, "the prompt is empty", **_PROMPT),
    counted("bos-in-the-text", {"prompt": "a <bos> b"}, "cannot be rendered", **_PROMPT),
    counted("too-long", {"prompt": "what " * 200}, "prompt longer than 64 tokens", **_PROMPT),
    counted(
        "unknown-role",
        {"messages": [{"role": "human", "content": "a"}]},
        "messages: role 'human' is not system, user or assistant",
        **_TALK,
    ),
    counted("role-twice", {"messages": [SAID[0], SAID[0], SAID[1]]}, "messages: the same role twice in a row", **_TALK),
    counted("empty-turn", {"messages": [SAID[0], SAID[1] | {"content": ""}]}, "messages: an empty turn", **_TALK),
    counted("no-turns", {"messages": []}, "messages is not a list of turns", **_TALK),
    counted(
        "picture",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages: content is not text",
        **_TALK,
    ),
    counted("turns-as-text", {"messages": json.dumps(SAID)}, "messages is not a list of turns", **_TALK),
    counted("unanswered", {"messages": SAID[:1]}, "messages does not end with an assistant turn", **_TALK),
    counted("ten-thousand-turns", {"messages": SAID * 10_000}, "prompt longer than 64 tokens", **_TALK),
    refused(
        "system-turn",
        lines({"messages": [{"role": "system", "content": "s"}, *SAID]}),
        r"set data\.system_role to merge",
        load="demonstrations",
    ),
)
