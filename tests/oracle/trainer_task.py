"""The enumerable task for the real trainer: a tiny Gemma whose whole language is four words, the last of which stops.

Prompts are made of the same four words and have different lengths, so sampling pads on the left; completions stop after
one to three words, so updates pad on the right. Nothing is masked away: 40 completions hold all the probability there
is, and π*(y|x) ∝ π_ref(y|x)·exp(r/β) can be written down.

Every prompt holds two different words, or the optimum could not be reached: without a BOS, attention over "a", "a a"
and "a a a" averages equal values, so the model says the same after each of them, whatever its weights.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from .enumerable import BETA, Language, Policy, reference_policy

WORDS = ("a", "b", "c", ".")
PROMPTS = ("a .", "b .", "c .", "a b .", "b c .", "c a .", "a c b .", "c b a .")
LANGUAGE = Language(vocabulary=4, longest=3)

RECIPE = """
objective: reinforce
run: {name: task, seed: SEED, steps: STEPS}
policy: {path: start, compute_dtype: float32}
reward: {functions: [{call: "tests.oracle.trainer_task:reward"}], missing_eos_score: null}
data:
  train: [{path: "tests.oracle.trainer_task:rows"}]
  max_prompt_tokens: 8
rollout: {samples_per_prompt: 8, max_new_tokens: 3}
kl: {beta: 0.5}
optim: {lr: 3.0e-3, schedule: cosine}
batch: {prompts_per_step: 64, microbatch_tokens: 4096}
checkpoint: {every_steps: null}
tracking: {to: [], samples: 0}
"""


def rows() -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in PROMPTS]


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The table of ``reference_policy``: 8 prompts, 40 completions."""
    return [_table()[pair] for pair in zip(prompts, completions, strict=True)]


@lru_cache
def _table() -> dict[tuple[str, str], float]:
    scores = reference_policy().rewards
    return {
        (prompt, _text(done)): float(scores[row, column])
        for row, prompt in enumerate(PROMPTS)
        for column, done in enumerate(LANGUAGE.completions)
    }


def _text(ids: tuple[int, ...]) -> str:
    return " ".join(WORDS[token] for token in ids if token != 3)  # the stop token is no text


def write_start(folder: Path, seed: int) -> None:
    """The policy to start from, which is also the reference: random, far from uniform."""
    from tests.support import tiny_lm

    lm = tiny_lm(
        seed,
        vocab_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        eos_token_id=3,
        bos_token_id=None,
        initializer_range=0.12,
        tie_word_embeddings=False,
    )
    lm.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".").save_pretrained(folder)


@torch.no_grad()
def next_token_logits(folder: Path) -> Tensor:
    """[8, prefixes, 4] float64: what the saved model says after every prompt and prefix, one unpadded row at a time."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in PROMPTS:
        ids = [WORDS.index(word) for word in prompt.split()]
        after = [lm(input_ids=torch.tensor([[*ids, *prefix]])).logits[0, -1] for prefix in LANGUAGE.prefixes]
        found.append(torch.stack(after).double())
    return torch.stack(found)


def distance_to_optimum(trained: Path, start: Path) -> Tensor:
    """[8] nats: KL(π‖π*) of each prompt, summed over all completions."""
    policy = Policy(LANGUAGE, next_token_logits(trained), next_token_logits(start), reference_policy().rewards)
    optimum = (policy.ref_logprobs.sum(-1) + policy.rewards / BETA).log_softmax(1)
    return (policy.probs * (policy.logprobs.sum(-1) - optimum)).sum(1)
