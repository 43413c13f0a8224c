"""Seconds from the first prompt to the last score, by a reward server that is asked while others decode or at the end.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py

Our decode loop in this process, ``rlhf serve-reward`` in another, one thread each. A random Gemma (hidden 128, 4
layers, vocabulary 4,096) of which 400 tokens end a completion, 16 prompts × 4 completions of at most 128; reward models
of width 256. Turn by turn in one run; medians over rounds of the ratio within a round.

Writes results/overlap.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import decode
import record
import torch

from rlhf.models.scratch import build_config, build_reward_model, train_tokenizer
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.replicas import Replicas
from rlhf.rewards.server import connect
from rlhf.sampling.hf import HFSampler

WORK = decode.Workload(name="variable length", new=128, stops=400)
JUDGES = {"reward model of 1 layer": 1, "reward model of 4 layers": 4}


@contextmanager
def served(layers: int, tokenizer: Any) -> Iterator[str]:
    """The address of a reward model of width 256 in a process of its own."""
    config = build_config("gemma", layers=layers, hidden_size=256, heads=4, vocab_size=4096)
    with tempfile.TemporaryDirectory() as folder:
        build_reward_model(config, seed=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        command = [sys.executable, "-m", "rlhf", "serve-reward", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().split()[-1]
            finally:
                process.terminate()


def one(model: Any, tokenizer: Any, rewards: RewardSet, early: bool) -> tuple[float, float]:
    """(seconds, those of them in which the server worked while we decoded)."""
    sampler = HFSampler(
        tokenizer=tokenizer,
        samples_per_prompt=WORK.k,
        max_new_tokens=WORK.new,
        stop_ids=tuple(range(100, 100 + WORK.stops)),
        ended=rewards.ended if early else None,
    )
    prompts = decode.prompts_of(WORK)
    started = time.perf_counter()
    scored = rewards.score(sampler.sample(model, prompts, range(len(prompts)), 1), 1)
    spent = time.perf_counter() - started
    assert bool(scored.valid.all())
    return spent, rewards.metrics(scored).get("time/score_hidden_seconds", 0.0)


def measure(name: str, layers: int, model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    with served(layers, tokenizer) as url:
        rewards = RewardSet(models=[(connect(Replicas(key="url", urls=(url,))), 1.0)])
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(rounds + 1):  # the first warms up
            for early, spent in found.items():
                spent.append(one(model, tokenizer, rewards, early))
    late, early = ([seconds for seconds, _ in found[side][1:]] for side in (False, True))
    ratios = [a / b for a, b in zip(late, early, strict=True)]
    return {
        "name": name,
        "late_seconds": round(statistics.median(late), 3),
        "early_seconds": round(statistics.median(early), 3),
        "hidden_seconds": round(statistics.median(hidden for _, hidden in found[True][1:]), 3),
        "late_over_early": [round(pick(ratios), 2) for pick in (statistics.median, min, max)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([" ".join(decode.WORDS[i : i + 50]) for i in range(0, 3000, 50)] * 2, 4096)
    model, rows = decode.policy(), []
    for name, layers in JUDGES.items():
        rows.append(measure(name, layers, model, tokenizer, given.rounds))
        print(rows[-1], flush=True)
    record.write("overlap", {"model": "gemma, hidden 128, 4 layers, fp32, 1 thread a process"}, rows)


if __name__ == "__main__":
    main()
