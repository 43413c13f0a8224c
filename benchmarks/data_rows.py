"""How long 100,000 rows take from a file to checked, tokenised examples, on one core.

    python benchmarks/data_rows.py [--rows 100000] [--rounds 3]

Rows are made by code: 60 words each out of 5000, as often as Zipf's law has it; the tokenizer is trained on some of
them. Measured, each from the file to examples within `max_prompt_tokens`, in seconds of CPU time (other work on the
machine does not count) and of the clock, the best of the rounds:

    read          lines to checked rows
    preferences   `load_preferences` of prompt + chosen + rejected as lists of messages: rendered by the chat template
    hh_rlhf       `load_preferences` of transcripts
    prompts       `load_prompts` of the same conversations
    text          `load_prompts` of plain text, the first 16 tokens each
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")  # one core

import record

from rlhf.data.load import SourceSpec, load_preferences, load_prompts
from rlhf.data.read import read_rows
from rlhf.models.scratch import train_tokenizer

MAX_PROMPT_TOKENS, PROMPT_TOKENS, VOCAB = 512, 16, 4096


def sentences(seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    """(question, good answer, bad answer)."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdflmnprst", k=draw.randint(2, 9))) for _ in range(5000)]
    often = list(accumulate(1 / rank for rank in range(1, 5001)))
    draw = random.Random(seed)
    for _ in range(count):
        said = draw.choices(words, cum_weights=often, k=60)
        question, good, bad = (" ".join(said[at : at + 20]).capitalize() + "." for at in (0, 20, 40))
        yield question, good, bad


def write(path: Path, rows: Iterator[dict[str, Any]]) -> SourceSpec:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return SourceSpec(path=str(path))


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def files(folder: Path, count: int) -> dict[str, SourceSpec]:
    def made(name: str, row: Callable[[str, str, str], dict[str, Any]]) -> SourceSpec:
        return write(folder / f"{name}.jsonl", (row(*texts) for texts in sentences(1, count)))

    return {
        "conversations": made(
            "conversations",
            lambda q, good, bad: {
                "prompt": turns("user", q),
                "chosen": turns("assistant", good),
                "rejected": turns("assistant", bad),
            },
        ),
        "hh_rlhf": made(
            "hh_rlhf",
            lambda q, good, bad: {
                "chosen": f"\n\nHuman: {q}\n\nAssistant: {good}",
                "rejected": f"\n\nHuman: {q}\n\nAssistant: {bad}",
            },
        ),
        "text": made("text", lambda q, good, bad: {"text": f"{q} {good} {bad}", "label": len(q) % 2}),
    }


def best(function: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """The lowest CPU and clock seconds, and how many examples there were."""
    cpu, clock = [], []
    for _ in range(rounds):
        begun, start = time.process_time(), time.perf_counter()
        examples = function()
        cpu.append(time.process_time() - begun)
        clock.append(time.perf_counter() - start)
    return {"cpu_seconds": round(min(cpu), 2), "clock_seconds": round(min(clock), 2), "examples": len(examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer((text for texts in sentences(2, 2000) for text in texts), VOCAB)
    limits: dict[str, Any] = {"tokenizer": tokenizer, "max_prompt_tokens": MAX_PROMPT_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        made = files(Path(folder), arguments.rows)
        chat, hh, text = made["conversations"], made["hh_rlhf"], made["text"]
        cases: dict[str, Callable[[], Any]] = {
            "read": lambda: read_rows(chat.path),
            "preferences": lambda: load_preferences([chat], **limits)[0],
            "hh_rlhf": lambda: load_preferences([hh], **limits)[0],
            "prompts": lambda: load_prompts([chat], **limits)[0],
            "text": lambda: load_prompts([text], prompt_tokens=PROMPT_TOKENS, **limits)[0],
        }
        table = []
        for name, case in cases.items():
            table.append({"case": name, **best(case, arguments.rounds)})
            print(table[-1], flush=True)
    load = [round(load, 1) for load in os.getloadavg()]
    record.write("data_rows", {"read": arguments.rows, "rounds": arguments.rounds, "load_average": load}, table)


if __name__ == "__main__":
    main()
