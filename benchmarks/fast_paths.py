"""What the fast paths save in a step: our decode loop, rows that share a prompt, texts that share a prefix.

    OMP_NUM_THREADS=1 python benchmarks/fast_paths.py --sft SFT --reward REWARD

SFT, REWARD: final/ of the quickstart's first two stages. One rollout of the quickstart (32 prompts × 4), and one with
every prompt five times over; each phase with its fast path and with the plain one, turn by turn. Medians over rounds
of the ratio within a round.

Writes results/fast_paths.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
import torch

from rlhf.data import quickstart
from rlhf.interfaces import Alone, StatsRequest, TokenStats, TrainState
from rlhf.models.chat import stop_ids
from rlhf.models.layout import Layout, SharedPrompts, plain_rows
from rlhf.models.load import frozen_copy, load_causal_lm, load_tokenizer
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.objectives.reinforce import Reinforce
from rlhf.rewards.model import RewardModel, load_reward_model
from rlhf.rollout import Prompt, Rollout, TokenBatch, Turn
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import PolicyForward, Term, Updater
from rlhf.sampling.hf import HFSampler

BUDGET = 8192  # tokens of a forward, the recipe's


@dataclass(frozen=True)
class Models:
    policy: ScoredModel
    reference: FrozenReference
    judge: RewardModel
    sampler: HFSampler
    updater: Updater

    @classmethod
    def load(cls, sft: Path, reward: Path) -> Models:
        lm: Any = load_causal_lm(str(sft))
        tokenizer = load_tokenizer(str(sft))
        policy = ScoredModel(lm)
        reference = FrozenReference(ScoredModel(frozen_copy(lm)))
        runtime = Runtime(accelerator=None, kind="single", device=torch.device("cpu"))
        adam = torch.optim.AdamW(policy.parameters(), lr=1e-9)  # the weights stay what they are for every round
        sampler = HFSampler(
            tokenizer=tokenizer,
            samples_per_prompt=4,
            max_new_tokens=64,
            stop_ids=stop_ids(tokenizer, lm.generation_config),
        )
        updater = Updater(runtime, policy, adam, lambda step: 1e-9, PolicyForward(reference), BUDGET)
        return cls(policy, reference, load_reward_model(str(reward), device="cpu"), sampler, updater)


def prompts(repeat: int) -> list[Prompt]:
    rows = quickstart.heldout_prompts()[:32]
    text = [" ".join([row["prompt"][0]["content"]] * repeat) for row in rows]
    return [Prompt(row_id=i, turns=(Turn(role="user", content=asked),)) for i, asked in enumerate(text)]


def phases(models: Models, asked: list[Prompt]) -> dict[str, dict[str, Callable[[], Any]]]:
    """phase → side → what to time."""
    rollout = models.sampler.sample(models.policy.causal_lm, asked, range(len(asked)), 1)
    scored = replace(rollout, rewards=models.judge.score(rollout), ref_logprobs=rollout.rollout_logprobs)
    batch, _ = Reinforce(beta=0.6).prepare(scored, TrainState(), Alone())

    def sample(plain: bool) -> Rollout:
        sampler = replace(models.sampler, plain=plain)
        return sampler.sample(models.policy.causal_lm, asked, range(len(asked)), 1)

    def reference(layout: Layout) -> Any:
        def forward(part: TokenBatch) -> TokenStats:
            return models.reference.stats(layout(part), StatsRequest())

        return microbatches.score(rollout, forward, BUDGET, None, layout.cells)

    def update(layout: Layout) -> Any:
        updater = replace(models.updater, forward=PolicyForward(models.reference, layout), cost=layout.cells)
        return updater.step([Term(objective=Reinforce(beta=0.6), batch=batch)], 1)

    shared = SharedPrompts()
    return {
        "sample": {"fast": lambda: sample(False), "plain": lambda: sample(True)},
        "score": {
            "fast": lambda: models.judge.score(rollout),
            "plain": lambda: replace(models.judge, shared=False).score(rollout),
        },
        "reference": {"fast": lambda: reference(shared), "plain": lambda: reference(plain_rows)},
        "update": {"fast": lambda: update(shared), "plain": lambda: update(plain_rows)},
    }


def measure(models: Models, repeat: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for phase, sides in phases(models, prompts(repeat)).items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for round_ in range(rounds + 1):  # the first warms up
            for side, run in sides.items():
                started = time.perf_counter()
                run()
                seconds[side] += [time.perf_counter() - started] if round_ else []
        ratios = [plain / fast for fast, plain in zip(seconds["fast"], seconds["plain"], strict=True)]
        median = {f"{side}_seconds": round(statistics.median(values), 3) for side, values in seconds.items()}
        spread = {"ratio_low": round(min(ratios), 2), "ratio_high": round(max(ratios), 2)}
        rows.append(
            {"prompt": repeat, "phase": phase, **median, "ratio": round(statistics.median(ratios), 2), **spread}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--reward", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = Models.load(given.sft, given.reward)
    rows = [row for repeat in (1, 5) for row in measure(models, repeat, given.rounds)]
    record.write("fast_paths", {"rollout": "32 prompts x 4, at most 64 new tokens, 1 thread, fp32"}, rows)


if __name__ == "__main__":
    main()
