"""What compare_trl.py compares, and the models and rows of a workload on disk."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlhf.models.load import export
from rlhf.models.scratch import EOS_ID, build_causal_lm, build_config, build_reward_model, train_tokenizer

TEXT_VOCAB = 4096  # ids that the tokenizer knows; a larger vocabulary has rows that nothing encodes to


@dataclass(frozen=True, kw_only=True)
class Workload:
    """prompts × k completions a step of at most ``new`` tokens; prompts of about ``prompt_tokens``.

    stop: chance of a stop token at each position; 0 = none before ``new``. The reward model reads 4,096 ids.
    """

    name: str
    prompts: int = 16
    k: int = 4
    prompt_tokens: int = 24
    new: int = 48
    stop: float = 0.0
    vocab: int = TEXT_VOCAB
    hidden: int = 128
    layers: int = 4
    reward_hidden: int = 256
    reward_layers: int = 8
    dtype: str = "float32"
    microbatch_tokens: int = 16384  # of ours; TRL takes all rows of a step at once
    kv_cache_gib: float = 4.0


WORKLOADS = {
    work.name: work
    for work in (
        Workload(name="W1 short fixed"),
        Workload(name="W2 variable length", new=128, stop=0.0205),
        Workload(name="W3 long prompt, k = 4", prompts=4, prompt_tokens=512),
        Workload(name="W3b long prompt, k = 8", prompts=4, prompt_tokens=512, k=8),
        Workload(name="W4 256k vocabulary", prompts=4, vocab=262144, hidden=64, new=24),
        Workload(name="W5 reward model x 10", new=128, stop=0.0205, reward_hidden=384, reward_layers=7),
    )
}


def make(work: Workload, folder: Path, steps: int) -> dict[str, int]:
    """policy/, reward/ and prompts.jsonl (a step's prompts after the other's) in the folder; the parameter counts."""
    words = _words(random.Random(0))
    vocabulary = [next(words) for _ in range(3000)]
    drawn = random.Random(1)
    tokenizer = train_tokenizer((" ".join(drawn.choices(vocabulary, k=20)) for _ in range(2000)), TEXT_VOCAB)
    tokenizer.chat_template = None  # its end of turn would stop a completion of ours, and none of TRL's
    policy = build_causal_lm(_config(work.hidden, work.layers, work.vocab), 0, stop_ids=[EOS_ID])
    _set_stop_chance(policy, work.stop)
    judge = build_reward_model(_config(work.reward_hidden, work.reward_layers, TEXT_VOCAB), 1)
    for model, name in ((policy, "policy"), (judge, "reward")):
        export(model, tokenizer, folder / name, stop_ids=[EOS_ID], card="")
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(steps * work.prompts):
            text = drawn.choice(vocabulary)
            wanted = (
                work.prompt_tokens if work.prompt_tokens > 100 else round(work.prompt_tokens * drawn.uniform(0.5, 1.5))
            )
            while len(tokenizer.encode(text)) < wanted:
                text += " " + drawn.choice(vocabulary)
            file.write(json.dumps({"prompt": text}) + "\n")
    (folder / "workload.json").write_text(json.dumps(asdict(work)), encoding="utf-8")
    return {name: sum(p.numel() for p in model.parameters()) for name, model in (("policy", policy), ("reward", judge))}


def _words(random_: random.Random) -> Iterator[str]:
    while True:
        yield "".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=random_.randint(2, 7)))


def _config(hidden: int, layers: int, vocab: int) -> Any:
    return build_config("gemma", layers=layers, hidden_size=hidden, heads=4, vocab_size=vocab, kv_heads=1)


def _set_stop_chance(model: PreTrainedModel, chance: float) -> None:
    """One dimension of every embedding is 1, so that it stands out in every hidden state; the stop token's is another,
    and a constant is added to its logit."""
    embeddings = cast(torch.Tensor, model.get_input_embeddings().weight)
    vocab, hidden = embeddings.shape
    carried = math.sqrt(hidden / 2)  # what that dimension is after the final norm: half of the squared length
    logit = math.log(vocab * math.e**0.25 * chance / (1 - chance)) if chance else -40.0
    with torch.no_grad():
        embeddings[:, 0] = 1.0
        embeddings[EOS_ID, 0] = 1.0 + logit / carried
