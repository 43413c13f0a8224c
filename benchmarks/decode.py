"""Tokens a second of our decode loop and of ``transformers.generate``, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/decode.py

One tiny Gemma (hidden 128, 4 layers, vocabulary 4,096, random weights, fp32), 16 prompts × 4 completions unless said.
Both sides draw the same tokens from the same noise; where they do not, the script exits with 1. A random model
hardly ever stops, so for variable lengths 400 of its 4,096 tokens count as stop tokens.
Medians over rounds of the ratio within a round; machines are noisy, rounds see the same noise.

Writes results/decode.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import record
import torch

from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer
from rlhf.rollout import Prompt, Rollout
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
    Workload(name="256 rows, variable length", prompts=64, new=128, stops=400),
)


def prompts_of(work: Workload) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (work.prompts, work.prompt_words), generator=generator).tolist()
    return [Prompt(row_id=i, text=" ".join(WORDS[w] for w in row)) for i, row in enumerate(drawn)]


def sides(work: Workload, tokenizer: Any) -> dict[str, HFSampler]:
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "samples_per_prompt": work.k,
        "max_new_tokens": work.new,
        "stop_ids": tuple(range(100, 100 + work.stops)),
    }
    return {"ours": HFSampler(**settings), "generate": HFSampler(**settings, plain=True)}


def measure(work: Workload, model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    prompts, seconds = prompts_of(work), {"ours": list[float](), "generate": list[float]()}
    found: dict[str, Rollout] = {}
    for step in range(rounds + 1):  # the first round warms up
        for name, sampler in sides(work, tokenizer).items():
            started = time.perf_counter()
            found[name] = sampler.sample(model, prompts, range(len(prompts)), 1)
            seconds[name] += [time.perf_counter() - started] if step else []
    same = (found["ours"].completion_mask.sum(1) == found["generate"].completion_mask.sum(1)).all()
    equal = bool(same) and torch.equal(found["ours"].completion_ids, found["generate"].completion_ids)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["generate"], strict=True)]
    tokens = int(found["ours"].completion_mask.sum())
    return {
        **asdict(work),
        "tokens": tokens,
        "same_completions": equal,
        **{f"{name}_tokens_per_second": round(tokens / statistics.median(times)) for name, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_low": round(min(ratios), 2),
        "ratio_high": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([" ".join(WORDS[i : i + 50]) for i in range(0, len(WORDS), 50)] * 2, 4096)
    config = build_config("gemma", layers=4, hidden_size=128, heads=4, vocab_size=4096)
    model = build_causal_lm(config, seed=0)
    rows = []
    for work in WORKLOADS:
        rows.append(measure(work, model, tokenizer, rounds))
        shown = rows[-1]
        speeds = f"{shown['ours_tokens_per_second']:7d} {shown['generate_tokens_per_second']:7d}"
        spread = f"{shown['ratio']:5.2f} ({shown['ratio_low']:.2f} to {shown['ratio_high']:.2f})"
        print(f"{work.name:28s} {shown['tokens']:6d} tokens   {speeds} tokens/s   ours / generate {spread}", flush=True)
    record.write("decode", {"model": "gemma, hidden 128, 4 layers, vocabulary 4096, fp32, 1 thread"}, rows)
    different = [row["name"] for row in rows if not row["same_completions"]]
    if different:
        raise SystemExit(f"other completions: {', '.join(different)}")


if __name__ == "__main__":
    main()
