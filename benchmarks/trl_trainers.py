"""TRL's RLOOTrainer or DPOTrainer on the quickstart's models and rows, with our settings as far as TRL has them.

    python benchmarks/trl_trainers.py rloo --steps 20 --prompts 16 --beta 0.3 --lr 5e-4 --seed 1 --out trl/NAME

Run in a folder that has runs/quickstart-sft/final and runs/quickstart-reward/final. The reward model is handed over
as a callable: TRL's own path encodes the reward model's text without BOS and EOS. What is the same: weights,
prompts, chat template, completions a step (dpo: pairs a step, on average), leave-one-out baseline, KL in the
reward, token sums, AdamW (ε 1e-8, no decay), norm clipping, our learning rate at every step, no dropout, no top-k.
What is not: the order of prompts and the sampling noise; and dpo's completions end in a newline after the stop
token, as the template has it.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DS_ACCELERATOR="cpu")

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from rlhf.data import quickstart
from rlhf.models.load import load_causal_lm, load_tokenizer
from rlhf.rewards.model import load_reward_model
from rlhf.rollout import Prompt, Turn
from rlhf.runtime.schedule import learning_rate_schedule

SFT, JUDGE = "runs/quickstart-sft/final", "runs/quickstart-reward/final"
MISSING_EOS = -1.0  # the recipe's


def reward_function(stops: set[int]) -> Any:
    """Our reward model as TRL calls rewards; a completion without a stop token gets what the recipe says."""
    judge = load_reward_model(JUDGE, device="cpu")

    def score(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = [Prompt(row_id=0, turns=tuple(Turn(**turn) for turn in prompt)) for prompt in prompts]
        texts = [completion[0]["content"] for completion in completions]
        found = judge.score_texts(asked, texts).tolist()
        return [v if stops & set(ids) else MISSING_EOS for v, ids in zip(found, completion_ids, strict=True)]

    return score


def policy() -> PreTrainedModel:
    return cast(PreTrainedModel, load_causal_lm(SFT))


def common(given: argparse.Namespace, rows: int) -> dict[str, Any]:
    return dict(
        output_dir=given.out,
        per_device_train_batch_size=rows,
        max_steps=given.steps,
        beta=given.beta,
        learning_rate=given.lr,
        max_grad_norm=1.0,
        weight_decay=0.0,
        adam_epsilon=1e-8,
        bf16=False,
        use_cpu=True,
        seed=given.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


def optimizers(given: argparse.Namespace, model: PreTrainedModel) -> Any:
    """Adam with the rate of our schedule at every step: transformers' own starts its warm-up at 0."""
    rate = learning_rate_schedule(given.lr, "linear", total_steps=given.steps, warmup_ratio=0.05)
    adam = torch.optim.AdamW(model.parameters(), lr=given.lr, eps=1e-8, weight_decay=0.0)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda done: rate(min(done + 1, given.steps)) / given.lr)


def rloo(given: argparse.Namespace, tokenizer: Any) -> Any:
    prompts = [row["prompt"] for row in quickstart.preferences()]
    model = policy()
    stops: Any = cast(Any, model.generation_config).eos_token_id
    return RLOOTrainer(
        model=model,
        optimizers=optimizers(given, model),
        reward_funcs=reward_function(set(stops)),
        args=RLOOConfig(
            **common(given, 4 * given.prompts),
            num_generations=4,
            max_completion_length=64,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_iterations=1,
            normalize_advantages=False,
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )


def dpo(given: argparse.Namespace, tokenizer: Any) -> Any:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in quickstart.preferences()]
    pairs = round(given.prompts * len(rows) / len({str(row["prompt"]) for row in rows}))  # ours takes all of a prompt
    model = policy()
    return DPOTrainer(
        model=model,
        optimizers=optimizers(given, model),
        ref_model=policy(),
        args=DPOConfig(**common(given, pairs), max_length=256),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=["rloo", "dpo"])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=int, required=True, help="a step, 4 completions each (dpo: pairs)")
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained policy")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL and transformers about each other's old names
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.manual_seed(given.seed)
    tokenizer = load_tokenizer(SFT)
    tokenizer.eos_token = "<end_of_turn>"  # what ends a reply in this template
    trainer = {"rloo": rloo, "dpo": dpo}[given.trainer](given, tokenizer)
    started = time.monotonic()
    trainer.train()
    (given.out / "seconds.txt").write_text(f"{time.monotonic() - started:.2f}\n")
    trainer.model.save_pretrained(given.out)
    load_tokenizer(SFT).save_pretrained(given.out)


if __name__ == "__main__":
    main()
