"""Tiny Gemma 4 models that also see, as the hub holds them: random weights, and a template with Gemma 4's turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from rlhf.data import quickstart
from rlhf.models.scratch import train_tokenizer

COMMON: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=2,
    head_dim=16,
    global_head_dim=32,
    layer_types=["sliding_attention", "full_attention"] * 3,
    sliding_window=8,
    max_position_embeddings=2048,
    final_logit_softcapping=30.0,
    initializer_range=0.2,
)
# The two dense kinds: small ones embed every token once more for each layer and share keys; large ones have one
# projection for keys and values of full attention, with fewer heads.
SMALL: dict[str, Any] = COMMON | dict(num_key_value_heads=1, hidden_size_per_layer_input=8, num_kv_shared_layers=2)
LARGE: dict[str, Any] = COMMON | dict(
    num_key_value_heads=2, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0
)
KINDS: dict[str, dict[str, Any]] = {"small": SMALL, "large": LARGE}
SEEING = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    position_embedding_size=16,
)

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{{- message['content'] | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def tokenizer() -> Any:
    """Gemma's special tokens and Gemma 4's two for turns."""
    texts = [turn["content"] for row in quickstart.demonstrations()[:200] for turn in row["messages"]]
    found: Any = train_tokenizer(texts, 400)
    found.add_special_tokens({"extra_special_tokens": ["<|turn>", "<turn|>"]})
    found.chat_template = TEMPLATE
    return found


def config(kind: str, vocab_size: int = 402, **more: Any) -> Gemma4Config:
    text = {**KINDS[kind], "vocab_size": vocab_size, "vocab_size_per_layer_input": vocab_size, **more}
    return Gemma4Config(text_config=text, vision_config=SEEING, audio_config=None)


def seeing(kind: str, seed: int = 0, **more: Any) -> Gemma4ForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma4ForConditionalGeneration(config(kind, **more))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.9)  # checkpoints have other values than 1
    return model.eval()


def write(folder: Path, kind: str) -> Gemma4ForConditionalGeneration:
    """A model folder as the hub has it: also sees, bfloat16 named as its type, a tokenizer."""
    made = tokenizer()
    model = seeing(kind, vocab_size=len(made))
    model.generation_config.eos_token_id = [1, made.convert_tokens_to_ids("<turn|>")]
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return model
