"""The real trainer on a task whose optimum is known in closed form.

    python benchmarks/toy_convergence.py [--seeds 3] [--steps 800] [--variants k1 exact]

A tiny Gemma speaks a language of four tokens, one of which stops, and completions of at most three of them: 40
completions a prompt, so the policy's whole distribution can be read off 8 · 40 forwards, and the policy that maximises
E[r] − β·KL(π‖π_ref) is π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β) (Ziegler et al. 2019, eq. 2). How far training got is
KL(π‖π*) in nats, mean over prompts; β times it is exactly what the objective still lacks.

Nothing stands in for the product: `programs.policy.train` runs `HFSampler` (transformers' generate), `RewardSet` with a
reward function, `FrozenReference`, `Reinforce` and `Updater`. The pad id is a token of the language and no BOS hides an
empty prompt, prompts have 2 to 9 tokens, and all four ids may be sampled everywhere. Completions cut at three tokens
have no stop token and keep their score.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import GemmaConfig, PreTrainedTokenizerFast

from rlhf.interfaces import StatsRequest, TrainState
from rlhf.models.layout import plain_rows
from rlhf.models.load import frozen_copy
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import build_causal_lm
from rlhf.objectives.reinforce import Reinforce
from rlhf.programs.evaluation import Evaluation
from rlhf.programs.policy import PolicyRun, train
from rlhf.programs.session import Session
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.functions import FunctionReward
from rlhf.rollout import Prompt, TokenBatch
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.schedule import learning_rate_schedule
from rlhf.runtime.updater import PolicyForward, Updater
from rlhf.sampling.hf import HFSampler

LETTERS, STOP, LONGEST = "abc", 3, 3  # ids 0, 1, 2 and the stop token
BETA = 0.5
# No prompt is another one plus a token or two, and none is one letter repeated: without a BOS, attention cannot count.
PROMPTS = ("ab", "cba", "bbca", "caacb", "acbbac", "bacacba", "ccabbabc", "abccbaabb")
# How far rewards spread, prompt by prompt: lognormal, and rounded from tests/oracle, whose task this one is with a
# transformer in place of a table. At 1.7 the best completion is e^7 times as likely under π* as under π_ref.
SPREADS = (0.66, 0.63, 0.62, 0.36, 1.70, 0.76, 1.39, 1.45)
RESULTS = Path(__file__).parent / "results" / "toy_convergence.json"
TARGETS = {"k1": 0.01, "exact": 0.003}  # nats


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per letter and a stop token, which is the pad token too."""
    vocabulary = {**{letter: at for at, letter in enumerate(LETTERS)}, "<eos>": STOP}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def completions() -> list[tuple[int, ...]]:
    """All 40: up to two letters and the stop token, or three letters."""
    letters = range(len(LETTERS))
    stopped = [(*word, STOP) for length in range(LONGEST) for word in product(letters, repeat=length)]
    return stopped + list(product(letters, repeat=LONGEST))


def rewards(seed: int) -> Tensor:
    """[P, N] float64: prompts differ in mean and in spread, as scores of a reward model do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(len(PROMPTS), columns, generator=generator, dtype=torch.float64)

    return 2.0 + normal(1) + normal(len(completions())) * torch.tensor(SPREADS, dtype=torch.float64)[:, None]


@dataclass(frozen=True)
class Exact:
    """What can be said of a policy when its whole distribution is known. Means over prompts."""

    to_optimum: float  # KL(π‖π*), nats
    to_reference: float  # KL(π‖π_ref), nats
    objective: float  # E[r] − β·KL(π‖π_ref)
    best_objective: float  # β·log Σ π_ref·exp(r/β)
    total_probability: float  # of the 40 completions; 1 up to rounding


def exact(model: ScoredModel, reference: ScoredModel, table: Tensor) -> Exact:
    """Enumerates both policies, padded as in training."""
    log_pi, log_ref = log_probabilities(model), log_probabilities(reference)
    tilted = log_ref + table / BETA
    log_best = tilted - tilted.logsumexp(1, keepdim=True)
    pi = log_pi.exp()
    return Exact(
        to_optimum=_mean(pi * (log_pi - log_best)),
        to_reference=_mean(pi * (log_pi - log_ref)),
        objective=_mean(pi * (table - BETA * (log_pi - log_ref))),
        best_objective=BETA * float(tilted.logsumexp(1).mean()),
        total_probability=_mean(pi),
    )


def _mean(per_completion: Tensor) -> float:
    return float(per_completion.sum(1).mean())


@torch.no_grad()
def log_probabilities(model: ScoredModel) -> Tensor:
    """[P, N] float64 log π(y|x) of every completion, from the trainer's own forward."""
    encode, words = tokenizer().encode, completions()
    batch = TokenBatch.from_ids(
        [encode(prompt) for prompt in PROMPTS for _ in words], [w for _ in PROMPTS for w in words]
    )
    stats = token_stats(model, plain_rows(batch), StatsRequest())
    return stats.logprobs.double().sum(1).view(len(PROMPTS), len(words))


@dataclass
class Trace:
    """A Tracker that keeps the exact numbers every so many steps, and how long steps took."""

    task: Task
    every: int
    rows: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name.startswith("time/"):
                self.seconds[name] = self.seconds.get(name, 0.0) + value
        if step % self.every == 0:
            now = self.task.exact()
            gap = {"sampler_gap": metrics["policy/sampler_gap"], "kl_reported": metrics["kl/reference"]}
            self.rows.append({"step": step, "to_optimum": now.to_optimum, "to_reference": now.to_reference, **gap})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing to keep."""

    def note(self, text: str) -> None:
        print(text)


@dataclass(frozen=True)
class EveryPrompt:
    """The same number of groups of each prompt at every step."""

    repeats: int

    def at(self, step: int) -> tuple[list[Prompt], range]:
        prompts = [Prompt(row_id=at, text=text) for _ in range(self.repeats) for at, text in enumerate(PROMPTS)]
        return prompts, range(len(prompts))


@dataclass(frozen=True)
class Task:
    """One seed: the initial model, which is also the reference, and the rewards."""

    seed: int
    hidden_size: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        config = GemmaConfig(
            vocab_size=len(LETTERS) + 1,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 4,
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=64,
            pad_token_id=None,  # an embedding with a padding index never learns it, and every id is a word here
            eos_token_id=STOP,
            bos_token_id=None,
        )
        lm = build_causal_lm(config, self.seed, stop_ids=(STOP,))
        object.__setattr__(self, "reference", ScoredModel(frozen_copy(lm)))
        object.__setattr__(self, "policy", ScoredModel(lm))
        object.__setattr__(self, "table", rewards(self.seed))

    policy: ScoredModel = field(init=False)
    reference: ScoredModel = field(init=False)
    table: Tensor = field(init=False)

    def exact(self) -> Exact:
        return exact(self.policy, self.reference, self.table)

    def reward(self) -> RewardSet:
        place = {word: at for at, word in enumerate(completions())}
        row = {prompt: at for at, prompt in enumerate(PROMPTS)}
        table = self.table.tolist()

        def score(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
            return [table[row[x]][place[tuple(y)]] for x, y in zip(prompts, completion_ids, strict=True)]

        return RewardSet(functions=[FunctionReward("table", score)])


def run(task: Task, objective: Reinforce, *, steps: int, lr: float, root: Path, k: int = 8, every: int = 50) -> Trace:
    """Trains the task's policy in place on 512 completions a step; returns what was recorded."""
    runtime = Runtime(accelerator=None, kind="single", device=torch.device("cpu"))
    trace = Trace(task, every)
    session = Session(runtime, trace, root, every_steps=0, keep=1)
    reference, reward_set = FrozenReference(task.reference), task.reward()
    tokens = tokenizer()
    sampler = HFSampler(
        tokenizer=tokens,
        samples_per_prompt=k,
        max_new_tokens=LONGEST,
        stop_ids=(STOP,),
        seed=task.seed,
        microbatch_rows=512,
    )
    optimizer = torch.optim.AdamW(task.policy.parameters(), lr=lr, weight_decay=0.0)
    schedule = learning_rate_schedule(lr, "linear", total_steps=steps, warmup_ratio=0.03)
    updater = Updater(
        runtime, task.policy, optimizer, schedule, PolicyForward(reference), microbatch_tokens=8192, max_grad_norm=None
    )
    evaluation = Evaluation(
        session=session,
        prompts=(),
        sampler=sampler,
        rewards=reward_set,
        reference=reference,
        temperature=1.0,
        microbatch_tokens=8192,
        every_steps=0,
        steps=steps,
    )
    policy_run = PolicyRun(
        session=session,
        model=task.policy,
        sampler=sampler,
        rewards=reward_set,
        reference=reference,
        objective=objective,
        beta=objective.beta,
        updater=updater,
        prompts=EveryPrompt(512 // (k * len(PROMPTS))),
        instruction=None,
        evaluation=evaluation,
        steps=steps,
        samples_logged=0,
    )
    train(policy_run, TrainState())
    return trace
