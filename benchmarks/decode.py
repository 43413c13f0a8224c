"""Tokens a second of our decode loop, of ``transformers.generate`` and of vLLM, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/decode.py
    OMP_NUM_THREADS=1 python benchmarks/decode.py --vllm .venv-vllm/bin/python      after `make test-vllm`

One tiny Gemma (hidden 128, 4 layers, vocabulary 4,096, random weights, fp32), 16 prompts × 4 completions unless said.
The first two draw the same tokens from the same noise; where they do not, the script exits with 1. vLLM draws its own,
so its completions have other lengths. It is timed without its push and check, in a process and with packages of its own
(those that its build asks for). A random model hardly ever stops, so for variable lengths 400 of its 4,096 tokens count
as stop tokens.
Medians over rounds of the ratio within a round; machines are noisy, rounds see the same noise.

Writes results/decode.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Client, Listener
from typing import Any

import record
import torch

from rlhf.models.chat import render_prompt
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer
from rlhf.rollout import Prompt, Rollout
from rlhf.sampling.completions import Ends
from rlhf.sampling.engine import Request
from rlhf.sampling.hf import HFSampler

WORDS = [f"w{index}" for index in range(3000)]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """prompts × k completions of prompt_words (about as many tokens, or twice) and at most new tokens."""

    name: str
    prompts: int = 16
    k: int = 4
    prompt_words: int = 10
    new: int = 48
    stops: int = 0  # how many ids end a completion


WORKLOADS = (
    Workload(name="short fixed"),
    Workload(name="variable length", new=128, stops=400),
    Workload(name="long prompt", prompt_words=250),
    Workload(name="long prompt, k = 8", prompt_words=250, k=8),
    Workload(name="256 rows, fixed", prompts=64),
    Workload(name="256 rows, variable length", prompts=64, new=128, stops=400),
)


def prompts_of(work: Workload) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (work.prompts, work.prompt_words), generator=generator).tolist()
    return [Prompt(row_id=i, text=" ".join(WORDS[w] for w in row)) for i, row in enumerate(drawn)]


@dataclass
class Side:
    """One decoder on one workload: seconds and tokens of every round, and the last rollout where it gives one."""

    decode: Callable[[], Rollout | int]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    found: Rollout | None = None

    def round(self, counted: bool) -> None:
        started = time.perf_counter()
        result = self.decode()
        spent = time.perf_counter() - started
        self.found = result if isinstance(result, Rollout) else None
        if counted:
            self.seconds.append(spent)
            self.tokens.append(result if isinstance(result, int) else int(result.completion_mask.sum()))

    @property
    def speeds(self) -> list[float]:
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]


Decode = Callable[[Sequence[Request], int, Ends], int]  # → tokens


def sides(work: Workload, model: Any, tokenizer: Any, vllm: Decode | None) -> dict[str, Side]:
    prompts, stops = prompts_of(work), tuple(range(100, 100 + work.stops))
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "samples_per_prompt": work.k,
        "max_new_tokens": work.new,
        "stop_ids": stops,
    }

    def ours(plain: bool) -> Rollout:
        return HFSampler(**settings, plain=plain).sample(model, prompts, range(len(prompts)), 1)

    def theirs(decode: Decode) -> int:
        ids = [render_prompt(tokenizer, prompt) for prompt in prompts for _ in range(work.k)]
        requests = [Request(row, 1.0, seed) for seed, row in enumerate(ids)]
        return decode(requests, work.new, Ends(None, stops))

    found = {"ours": Side(lambda: ours(False)), "generate": Side(lambda: ours(True))}
    return found if vllm is None else {**found, "vllm": Side(lambda: theirs(vllm))}


def measure(work: Workload, model: Any, tokenizer: Any, rounds: int, vllm: Decode | None) -> dict[str, Any]:
    """Ratios are of tokens a second within a round."""
    taken = sides(work, model, tokenizer, vllm)
    for round_ in range(rounds + 1):  # the first warms up
        for side in taken.values():
            side.round(counted=round_ > 0)
    ours, plain = taken["ours"].found, taken["generate"].found
    assert ours is not None and plain is not None
    same = bool((ours.completion_mask.sum(1) == plain.completion_mask.sum(1)).all())
    row: dict[str, Any] = {**asdict(work), "tokens": taken["ours"].tokens[-1]}
    row["same_completions"] = same and torch.equal(ours.completion_ids, plain.completion_ids)
    for name, side in taken.items():
        row[f"{name}_tokens_per_second"] = round(statistics.median(side.speeds))
        if name != "ours":
            ratios = [a / b for a, b in zip(taken["ours"].speeds, side.speeds, strict=True)]
            row[f"over_{name}"] = [round(pick(ratios), 2) for pick in (statistics.median, min, max)]
    return row


@contextmanager
def vllm_beside(python: str) -> Iterator[Decode]:
    """vLLM with the model's weights in another process, which waits while the others decode."""
    with Listener() as door:
        child = subprocess.Popen([python, __file__, "--answer", str(door.address)])
        with door.accept() as pipe:
            assert pipe.recv() == "ready"

            def decode(requests: Sequence[Request], new: int, ends: Ends) -> int:
                pipe.send(([tuple(request) for request in requests], new, ends.ids))
                found: int = pipe.recv()
                return found

            yield decode
            pipe.send(None)
        child.wait()


def answer(address: str) -> None:
    """The other side of ``vllm_beside``."""
    from rlhf.sampling.vllm import InProcess, Start

    model: Any = policy()
    engine = InProcess(start=Start(tokens=768, dtype=torch.float32, kv_bytes=2 * 2**30))
    model.config.architectures = [type(model).__name__]
    engine.push(model.config, model.state_dict().items())
    with Client(address) as pipe:
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            rows, new, stops = asked
            found = engine.begin([Request(*row) for row in rows], new, Ends(None, stops))()
            pipe.send(sum(len(row.ids) for row in found))


def policy() -> Any:
    return build_causal_lm(build_config("gemma", layers=4, hidden_size=128, heads=4, vocab_size=4096), seed=0)


def shown(row: dict[str, Any]) -> str:
    cells = [f"{row['name']:28s} {row['tokens']:6d} tokens   ours {row['ours_tokens_per_second']:6d}/s"]
    for name in ("generate", "vllm"):
        if f"over_{name}" in row:
            middle, low, high = row[f"over_{name}"]
            speed = row[f"{name}_tokens_per_second"]
            cells.append(f"{name} {speed:6d}/s   ours / {name} {middle:5.2f} ({low:.2f} to {high:.2f})")
    return "   ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm", metavar="PYTHON", help="a third side, by the interpreter of an environment with it")
    parser.add_argument("--answer", metavar="ADDRESS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.answer:
        return answer(given.answer)
    tokenizer = train_tokenizer([" ".join(WORDS[i : i + 50]) for i in range(0, len(WORDS), 50)] * 2, 4096)
    rows, model = [], policy()
    with vllm_beside(given.vllm) if given.vllm else nullcontext() as vllm:
        for work in WORKLOADS:
            rows.append(measure(work, model, tokenizer, given.rounds, vllm))
            print(shown(rows[-1]), flush=True)
    settings = {"model": "gemma, hidden 128, 4 layers, vocabulary 4096, fp32, 1 thread"}
    record.write("decode", settings, rows)
    different = [row["name"] for row in rows if not row["same_completions"]]
    if different:
        raise SystemExit(f"other completions: {', '.join(different)}")


if __name__ == "__main__":
    main()
