"""What the counter-based sampling noise costs, as a share of decode time on the tiny Gemma.

    python benchmarks/sampling_noise.py [--rounds 9] [--tokens 48]

Three decodes of the same prompts, interleaved (shared machines drift by far more than the difference):
`HFSampler.sample`, `HFSampler.greedy` (the same path without noise: it records the same log-probabilities) and
`transformers.generate` with its own multinomial sampling, which records none. Medians over rounds:

    choice share  time inside `sample_tokens` / whole decode: softmax, noise, arg-max and log-probability together
    noise share   the same minus greedy's time inside `sample_tokens`: what drawing at random adds
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import record
import torch
from transformers import GenerationConfig

from rlhf.models.chat import render_prompt
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer
from rlhf.rollout import Prompt, pad_rows
from rlhf.sampling import hf, noise
from rlhf.sampling.hf import HFSampler

VOCAB, HIDDEN, LAYERS = 4096, 128, 4


class Stopwatch:
    """Adds up the seconds spent in the function it stands in for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - start
        return result

    def lap(self) -> float:
        """Seconds since the last lap."""
        spent, self.seconds = self.seconds, 0.0
        return spent


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def case(model: Any, tokenizer: Any, rows: int, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds per token position for one batch size and compute type."""
    prompts = [Prompt(row_id=row, text="the film was a quiet wonder and") for row in range(rows)]
    sampler = HFSampler(
        tokenizer=tokenizer, samples_per_prompt=1, max_new_tokens=tokens, microbatch_rows=rows, compute_dtype=dtype
    )
    watch = Stopwatch(noise.sample_tokens)
    names = ("sample", "choice", "greedy", "greedy_choice", "stock")
    found: dict[str, list[float]] = {name: [] for name in names}
    with mock.patch.object(hf, "sample_tokens", watch):
        for _ in range(rounds + 1):
            found["sample"].append(seconds(lambda: sampler.sample(model, prompts, range(rows), 1)))
            found["choice"].append(watch.lap())
            found["greedy"].append(seconds(lambda: sampler.greedy(model, prompts, range(rows), 1)))
            found["greedy_choice"].append(watch.lap())
            found["stock"].append(seconds(lambda: stock(model, tokenizer, prompts, dtype, tokens)))
    kept = {name: values[1:] for name, values in found.items()}  # the first round warms up
    rows_of = list(zip(*(kept[name] for name in names), strict=True))
    shares = {
        "noise_share": [(choice - without) / sample for sample, choice, _, without, _ in rows_of],
        "choice_share": [choice / sample for sample, choice, _, _, _ in rows_of],
        "stock_over_sample": [plain / sample for sample, _, _, _, plain in rows_of],
    }
    medians = {f"{name}_ms": round(statistics.median(v) / tokens * 1e3, 3) for name, v in kept.items()}
    return medians | {name: round(statistics.median(v), 4) for name, v in shares.items()}


def stock(model: Any, tokenizer: Any, prompts: list[Prompt], dtype: torch.dtype, tokens: int) -> None:
    """transformers' own sampling from the whole distribution."""
    ids, mask = pad_rows([render_prompt(tokenizer, prompt) for prompt in prompts], side="left")
    config: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0
    )
    low = dtype == torch.bfloat16
    kept, model.generation_config = model.generation_config, config
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype if low else None, enabled=low):
        model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
    model.generation_config = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(["the film was a quiet wonder and nobody minded"] * 4, 300)
    config = build_config("gemma", layers=LAYERS, hidden_size=HIDDEN, heads=4, vocab_size=VOCAB)
    model = build_causal_lm(config, seed=0)
    table = []
    print("threads rows dtype     sample greedy  stock  noise choice (ms a token position; shares of sample)")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (64, 256):
                row = case(model, tokenizer, rows, dtype, arguments.tokens, arguments.rounds)
                name = str(dtype).removeprefix("torch.")
                table.append({"threads": threads, "rows": rows, "dtype": name, **row})
                times = f"{row['sample_ms']:6.2f} {row['greedy_ms']:6.2f} {row['stock_ms']:6.2f}"
                shares = f"{row['noise_share']:6.1%} {row['choice_share']:6.1%}"
                print(f"{threads:7d} {rows:4d} {name:9s} {times} {shares}", flush=True)
    settings = {
        "model": f"gemma, hidden {HIDDEN}, {LAYERS} layers, vocabulary {VOCAB}",
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
    }
    record.write("sampling_noise", settings, table)


if __name__ == "__main__":
    main()
