"""What a model's configuration says of its size. Models are built on the meta device, so that counts are exact and
nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf.errors import UserError
from rlhf.models.families import refuse_variant
from rlhf.models.quantized import KEPT, Bits

Attention = Literal["eager", "sdpa", "flash"]

# What families do beside the usual decoder layer (a norm before attention, one before a gated MLP).
_SANDWICHED = ("gemma2", "gemma3", "gemma3_text", "gemma4_text")
_NORMED_QUERIES = ("gemma3", "gemma3_text", "gemma4_text", "qwen3")
_UNGATED = ("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder by its numbers. Widths in elements, counts in weights.

    name: what the recipe calls it. source: where its numbers come from. parameters: all of them, tied ones once.
    head: of the output head, vocabulary × hidden. own_head: it is not tied to the embedding. layer: of one decoder
    layer. largest: of the largest matrix in a layer. linear_widths: inputs + outputs of every linear layer that an
    adapter would sit on. packable: in matrices that quantizing takes, packable_rows: outputs of those. kv_layers: that
    have keys and values of their own; 0 = all. stored_bytes: of a weight on disk. scalar: one score in place of the
    vocabulary.
    """

    name: str
    source: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    head: int
    own_head: bool
    layer: int
    largest: int
    linear_widths: int
    packable: int = 0
    packable_rows: int = 0
    kv_layers: int = 0
    attention: Attention = "sdpa"
    softcap: bool = False
    stored_bytes: int = 2
    scalar: bool = False

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values have the same."""
        return self.kv_heads * self.head_dim

    @property
    def trunk(self) -> int:
        """Weights that every token is multiplied with: no embedding, no output head."""
        return self.layers * self.layer

    @property
    def sandwiched(self) -> bool:
        """Two more norms a layer, on what attention and MLP return (Gemma 2 and later)."""
        return self.family in _SANDWICHED

    @property
    def normed_queries(self) -> bool:
        return self.family in _NORMED_QUERIES

    @property
    def gated(self) -> bool:
        return self.family not in _UNGATED

    @property
    def row(self) -> int:
        """Keys of one token in all layers together; values have the same."""
        return (self.kv_layers or self.layers) * self.keys

    def packed(self, bits: Bits) -> float:
        """Bytes of the matrices that are quantized. 4bit: half a byte a weight, a byte a block of 64 for its largest,
        and a float for 256 of those; 8bit: a byte a weight, and a float a row."""
        if bits == "4bit":
            return self.packable * (1 / 2 + 1 / 64 + 4 / (64 * 256))
        return self.packable + 4.0 * self.packable_rows

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter of this rank: r·(inputs + outputs) a linear layer."""
        return rank * self.linear_widths

    def as_scalar(self) -> Shape:
        """The same trunk with a scalar head: a reward model or a critic."""
        if self.scalar:
            return self
        kept = self.parameters - (self.head if self.own_head else 0)
        return replace(self, parameters=kept + self.hidden, head=self.hidden, own_head=True, scalar=True)


def read_shape(
    config: Any, *, name: str, source: str, attention: str = "auto", targets: str | Sequence[str] = "all-linear"
) -> Shape:
    """The shape of a transformers configuration; of a model that also sees, its text part.

    attention: the recipe's choice. targets: the linear layers that an adapter would sit on. Raises UserError for a
    configuration that no causal language model is made of.
    """
    text = config.get_text_config()
    refuse_variant(text, name)
    model = _on_meta(text, name, attention)
    layers = _layers(model, text.num_hidden_layers, name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    stored = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    heads = text.num_attention_heads
    head_dim, kv_heads = _mean_heads(text)
    matrices = [module for path, module in model.named_modules() if _quantized(path, module)]
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | _conv1d_type()) and module is not head
    ]
    return Shape(
        name=name,
        source=source,
        family=text.model_type,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_layers=text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0),
        vocab=text.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        head=head.weight.numel(),
        own_head=head.weight is not embedding.weight,
        layer=sum(p.numel() for p in layers.parameters()) // len(layers),
        largest=max(module.weight.numel() for _, module in linears),
        linear_widths=sum(sum(module.weight.shape) for path, module in linears if _targeted(path, targets)),
        packable=sum(module.weight.numel() for module in matrices),
        packable_rows=sum(
            module.nf if isinstance(module, _conv1d_type()) else module.out_features for module in matrices
        ),
        attention=_kernel(model.config._attn_implementation),
        softcap=getattr(text, "final_logit_softcapping", None) is not None,
        stored_bytes=torch.empty(0, dtype=getattr(torch, stored) if isinstance(stored, str) else stored).element_size(),
    )


def _on_meta(config: Any, name: str, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    make = cast(Any, AutoModelForCausalLM).from_config
    # an attention kernel that is not installed here may be there where the run will be
    kernel = {"attn_implementation": attention} if attention in ("eager", "sdpa", "flex_attention") else {}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = make(config, **kernel)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"{name}: no causal language model can be made of its configuration ({reason})") from error
    if attention.startswith("flash"):
        model.config._attn_implementation = attention
    return model


def _layers(model: Any, count: int, name: str) -> nn.ModuleList:
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UserError(f"{name}: its decoder layers were not found, so nothing can be said of its memory")
    return found[0]


def _conv1d_type() -> type[Any]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _mean_heads(text: Any) -> tuple[int, int]:
    """(head width, key heads) that stand for all layers, rounded up; they differ between the layers of Gemma 4."""
    own = getattr(text, "per_layer_config", None)
    layers = [own[i] if own else text for i in range(text.num_hidden_layers)]
    heads = text.num_attention_heads
    dims = [getattr(layer, "head_dim", None) or text.hidden_size // heads for layer in layers]
    counts = [getattr(layer, "num_key_value_heads", None) or heads for layer in layers]
    head_dim = -(-sum(dims) // len(dims))
    widths = sum(dim * count for dim, count in zip(dims, counts, strict=True))
    return head_dim, -(-widths // (len(dims) * head_dim))


def _quantized(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _conv1d_type()) and not path.endswith(KEPT)


def _targeted(path: str, targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) or path.rpartition(".")[2] in targets


def _kernel(implementation: str | None) -> Attention:
    if implementation == "eager":
        return "eager"
    return "flash" if implementation and "flash" in implementation else "sdpa"
