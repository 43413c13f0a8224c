"""A tiny Gemma made from nothing: tokenizer, configuration and random weights, with no download.

The tokenizer is a byte-level BPE (every UTF-8 text decodes to itself) with Gemma's special tokens at fixed ids and a
chat template with Gemma's turns. The weights are drawn here rather than by transformers: its N(0, 0.02) is made for
widths in the thousands, and at width 128 it starts with a signal far too small to learn from in a minute.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.errors import UserError

Family = Literal["gemma", "gemma2", "gemma3", "gemma4"]
FAMILIES: tuple[Family, ...] = ("gemma", "gemma2", "gemma3", "gemma4")

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID, START_OF_TURN_ID, END_OF_TURN_ID = range(len(SPECIAL_TOKENS))
STOP_IDS = (EOS_ID, END_OF_TURN_ID)

# Gemma's turns: one BOS, user and model alternate, no system role, and the text of a turn is left exactly as it is.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- raise_exception('System role not supported: this template has user and assistant turns only') -}}
{%- endif -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('Turns must alternate user, assistant, user, ... and start with user') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' -}}
{{- message['content'] + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, special tokens and the 256 bytes included.

    Ids 0 to 5 are ``SPECIAL_TOKENS``. ``encode`` puts one BOS in front unless ``add_special_tokens=False``. The same
    texts in the same order give the same tokenizer. Raises UserError when ``vocab_size`` leaves no room for a merge.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size <= smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {smallest} ids are taken by special tokens and single bytes; "
            "set policy.scratch.vocab_size to 512 or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
    )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_config(
    family: str,
    *,
    layers: int,
    hidden_size: int,
    heads: int,
    vocab_size: int,
    intermediate_size: int | None = None,
    kv_heads: int | None = None,
    sliding_window: int = 64,
    max_positions: int = 2048,
) -> PreTrainedConfig:
    """A text configuration of a Gemma family with tied embeddings, fp32, no dropout.

    ``intermediate_size`` defaults to 4 · hidden_size, ``kv_heads`` to half the heads. Gemma 2, 3 and 4 alternate
    sliding-window and full attention, the last layer full (Gemma 4 insists on that); Gemma 2 keeps its soft-caps; Gemma
    4 is the text model without per-layer inputs, experts or shared KV. Raises UserError for an unknown family and for a
    width that the heads do not divide.
    """
    if family not in FAMILIES:
        raise UserError(f"scratch family {family!r} is not known; set policy.scratch.family to one of {list(FAMILIES)}")
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise UserError(
            f"hidden_size {hidden_size} over {heads} heads gives no even head width; "
            "set policy.scratch.hidden_size to an even multiple of policy.scratch.heads"
        )
    head_dim = hidden_size // heads
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or max(1, heads // 2),
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": BOS_ID,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    config: PreTrainedConfig = _config_class(family)(
        **common, **_family_settings(family, layers, head_dim, vocab_size, sliding_window)
    )
    return config


def build_causal_lm(config: PreTrainedConfig, seed: int, stop_ids: Sequence[int] = STOP_IDS) -> PreTrainedModel:
    """A causal language model with random fp32 weights, a pure function of (config, seed).

    The caller's random state is left as it was. ``generation_config`` stops on every id in ``stop_ids``.
    """
    model = empty_causal_lm(config)
    _draw_weights(model, config, seed)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id, eos_token_id=list(stop_ids)
    )
    return model


def empty_causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    """The same model with weights of no meaning."""
    import transformers as hf

    classes: dict[str, Any] = {
        "gemma": hf.GemmaForCausalLM,
        "gemma2": hf.Gemma2ForCausalLM,
        "gemma3_text": hf.Gemma3ForCausalLM,
        "gemma4_text": hf.Gemma4ForCausalLM,
    }
    return _construct(classes[config.model_type], config)


def build_reward_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The same trunk with a scalar head drawn from N(0, 1/√(d+1)) (Stiennon et al. 2020), no bias.

    Families: gemma, gemma2 and gemma3, for which transformers has a text sequence-classification class; Gemma 4 has
    none and raises UserError.
    """
    import transformers as hf

    classes: dict[str, Any] = {
        "gemma": hf.GemmaForSequenceClassification,
        "gemma2": hf.Gemma2ForSequenceClassification,
        "gemma3_text": hf.Gemma3TextForSequenceClassification,
    }
    if config.model_type not in classes:
        raise UserError(
            f"transformers has no sequence-classification class for {config.model_type}, so it cannot score; "
            "set policy.scratch.family to gemma, gemma2 or gemma3"
        )
    config = copy.deepcopy(config)
    config.num_labels = 1
    model = _construct(classes[config.model_type], config)
    _draw_weights(model, config, seed)
    return model


def _config_class(family: str) -> type[Any]:
    import transformers as hf

    classes: dict[str, type[Any]] = {
        "gemma": hf.GemmaConfig,
        "gemma2": hf.Gemma2Config,
        "gemma3": hf.Gemma3TextConfig,
        "gemma4": hf.Gemma4TextConfig,
    }
    return classes[family]


def _family_settings(family: str, layers: int, head_dim: int, vocab_size: int, sliding_window: int) -> dict[str, Any]:
    if family == "gemma":
        return {"hidden_activation": "gelu_pytorch_tanh"}
    # Counted from the last layer, so that it is always a full one.
    kinds = ["sliding_attention" if (layers - 1 - i) % 2 else "full_attention" for i in range(layers)]
    windowed: dict[str, Any] = {"sliding_window": sliding_window, "layer_types": kinds}
    if family == "gemma4":
        return windowed | {
            "global_head_dim": head_dim,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": vocab_size,
        }
    return windowed | {"query_pre_attn_scalar": head_dim}


def _construct(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    # Construction draws weights from the global generator (thrown away below); the caller must not notice.
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    return cast(PreTrainedModel, model.to(torch.float32))


def _draw_weights(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> None:
    """Embeddings N(0, 1/√d): Gemma multiplies them by √d on the way in and the normed state has norm √d on the way out,
    so both the residual stream and the logits start at unit scale. Linears N(0, 1/√fan_in), those that write into the
    residual stream divided by √(2 · layers). Norms keep what transformers gave them."""
    generator = torch.Generator().manual_seed(seed)
    residual = math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
            elif name == "score":
                cast(nn.Linear, module).weight.normal_(0.0, (config.hidden_size + 1) ** -0.5, generator=generator)
            elif isinstance(module, nn.Linear) and not name.endswith("lm_head"):  # lm_head is the embedding, tied
                std = module.in_features**-0.5 / (residual if name.endswith(("o_proj", "down_proj")) else 1.0)
                module.weight.normal_(0.0, std, generator=generator)
