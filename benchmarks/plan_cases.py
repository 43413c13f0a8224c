"""What plan.py predicts and measures: recipes of one step on random models, every row of the same length."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.models.load import export
from rlhf.models.scratch import STOP_IDS, build_causal_lm, build_config, build_reward_model, train_tokenizer

BUCKET = 1_000_000  # elements: DeepSpeed's default of 500 million would be all that is seen of a small model


@dataclass(frozen=True, kw_only=True)
class Case:
    """policy, reward: what the models are made of (``build_config``). changes: dotted recipe keys. stage: of ZeRO on
    two processes; None = one process."""

    policy: dict[str, Any]
    reward: dict[str, Any] | None
    changes: dict[str, Any]
    stage: int | None = None


def _size(hidden: int, layers: int, family: str = "gemma", vocab: int = 2048, **more: Any) -> dict[str, Any]:
    return {"family": family, "hidden_size": hidden, "layers": layers, "heads": 4, "vocab_size": vocab, **more}


SMALL, MIDDLE = _size(128, 4), _size(256, 6)
KEYS = {"batch.prompts_per_step": 16, "data.prompt_tokens": 48, "rollout.max_new_tokens": 48}
QLORA = {"policy.lora": {"r": 16, "alpha": 32.0}, "policy.quantize": "4bit"}

CASES: dict[str, Case] = {
    "reinforce": Case(policy=MIDDLE, reward=SMALL, changes={}),
    "recompute": Case(policy=MIDDLE, reward=SMALL, changes={"batch.activations": "recompute"}),
    "large reward model": Case(policy=SMALL, reward=_size(512, 8), changes={}),
    "one forward": Case(policy=SMALL, reward=SMALL, changes={"batch.microbatch_tokens": 16384}),
    "plain rows": Case(policy=MIDDLE, reward=SMALL, changes={"batch.share_prompts": False}),
    "32k vocabulary": Case(policy=_size(128, 2, vocab=32768), reward=SMALL, changes={"batch.prompts_per_step": 4}),
    "lora": Case(policy=MIDDLE, reward=SMALL, changes={"policy.lora": {"r": 16, "alpha": 32.0}}),
    "qlora": Case(policy=MIDDLE, reward=SMALL, changes=QLORA),
    "8-bit reward model": Case(policy=SMALL, reward=_size(512, 8), changes={"reward.models.0.quantize": "8bit"}),
    "ppo": Case(policy=SMALL, reward=MIDDLE, changes={"objective": "ppo"}),
    "exact KL": Case(policy=MIDDLE, reward=SMALL, changes={"kl.estimator": "exact"}),
    "gemma 2": Case(policy=_size(192, 4, "gemma2"), reward=SMALL, changes={}),
    "gemma 3": Case(policy=_size(192, 4, "gemma3"), reward=SMALL, changes={}),
    "gemma 4": Case(policy=_size(192, 4, "gemma4"), reward=SMALL, changes={}),
    "generate": Case(policy=MIDDLE, reward=SMALL, changes={"rollout.decode": "generate"}),
    "bf16": Case(policy=MIDDLE, reward=None, changes={"policy.compute_dtype": "bfloat16", "batch.prompts_per_step": 8}),
    "zero 2": Case(policy=MIDDLE, reward=SMALL, changes={}, stage=2),
    "zero 3": Case(policy=MIDDLE, reward=SMALL, changes={}, stage=3),
}


def make(case: Case, folder: Path) -> None:
    """Models, rows, ``recipe.yaml`` and, for two processes, ``accelerate.yaml``."""
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 7))) for _ in range(2000)]
    tokenizer = train_tokenizer((" ".join(drawn.choices(words, k=20)) for _ in range(1000)), 2048)
    policy = build_causal_lm(build_config(**case.policy), 0)
    export(policy, tokenizer, folder / "policy", stop_ids=STOP_IDS, card="")
    if case.reward is not None:
        export(build_reward_model(build_config(**case.reward), 1), tokenizer, folder / "reward", stop_ids=[], card="")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(64):
            file.write(json.dumps({"text": " ".join(drawn.choices(words, k=120))}) + "\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(case, folder)), encoding="utf-8")
    if case.stage is not None:
        _launch(folder, case.stage)


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    functions = [{"call": "plan_cases:length"}] if case.reward is None else []
    values: dict[str, Any] = {
        "objective": "reinforce",
        "run": {"name": "plan", "steps": 2, "output_dir": str(folder / "run")},
        "policy": {"path": str(folder / "policy")},
        "reward": {"models": [{"path": str(folder / "reward")}] if case.reward else [], "functions": functions},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
        "rollout": {"samples_per_prompt": 4},
        "optim": {"lr": 1e-6},
        "batch": {"microbatch_tokens": 2048},
        "eval": {"every_steps": None},
        "tracking": {"to": []},
    }
    for dotted, value in {**KEYS, **case.changes}.items():
        *sections, key = dotted.split(".")
        here: Any = values
        for section in sections:
            here = here[int(section)] if isinstance(here, list) else here.setdefault(section, {})
        here[key] = value
    return values


def length(completions: list[str], **columns: Any) -> list[float]:
    """A reward without a model."""
    return [float(len(text)) for text in completions]


def _launch(folder: Path, stage: int) -> None:
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET // 10}
    zero |= {"stage3_param_persistence_threshold": 0}  # whole tensors below 100,000: most of a small model
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    (folder / "deepspeed.json").write_text(json.dumps(settings), encoding="utf-8")
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False},
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "main_process_port": 0,
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(accelerate), encoding="utf-8")
