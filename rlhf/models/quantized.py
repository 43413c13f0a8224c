"""Frozen weights in fewer bits, by bitsandbytes: what is quantized, how it computes, and what it holds.

``4bit``: NF4, a float a block of 64 weights, those floats in 8 bits again (QLoRA, Dettmers et al. 2023). ``8bit``:
int8, one float a row. The matrices of linear layers alone; embeddings, the output or score head and norms stay as they
are. A matrix is made whole where it is read, and activations are never rounded. LLM.int8 would round them too, each
batch in its own way: on a random Gemma of two layers a row's logits moved by .02 with the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.errors import UserError

Bits = Literal["4bit", "8bit"]
KEPT = ("lm_head", "embed_out", "score", "classifier")  # heads by the names that families give them


@dataclass(frozen=True)
class Quantization:
    """How a model is loaded. compute_dtype: of its matrix products. device: where it lies and stays."""

    bits: Bits
    compute_dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def loading(self) -> dict[str, Any]:
        """Keywords of ``from_pretrained``: each matrix is quantized as it is read."""
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=self.bits == "4bit",
            load_in_8bit=self.bits == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=list(KEPT),
        )
        return {"quantization_config": config, "device_map": {"": self.device}}


def settle(model: nn.Module, what: str) -> None:
    """Makes a freshly loaded model compute as this module says. what: its key and path, for messages.

    Raises UserError where a head was quantized: log-probabilities are made of its weight, and a score is one row of it.
    """
    layers = _layers()
    for name, module in model.named_modules():
        if not isinstance(module, layers.Linear4bit | layers.Linear8bitLt):
            continue
        if module is cast(Any, model).get_output_embeddings():
            raise UserError(f"{what}: its output head {name} would be quantized, and log π is made of it; set null")
        packed: Any = module
        if isinstance(module, layers.Linear8bitLt):
            packed.__class__ = _row_scaled()
            packed.weight.CB = None  # the weight itself once more; a copy of the model would hold it twice
        else:
            # On processors with AVX512-BF16 the first forward without gradient repacks the weights for a kernel that
            # rounds to bfloat16 and has no backward.
            packed.support_avx512bf16_for_cpu = False


def _layers() -> Any:
    """bitsandbytes' layers; untyped, so that types are checked alike with the extra and without."""
    import bitsandbytes.nn

    return bitsandbytes.nn


@cache
def _row_scaled() -> type[nn.Module]:
    """int8 weights and whole activations. A class is needed, because peft and transformers ask for its base; made when
    it is first used, because bitsandbytes is an extra."""

    class RowScaled(_layers().Linear8bitLt):  # type: ignore[misc]
        """y = x·Wᵀ + b with W = int8 · (largest of the row / 127)."""

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            weight = self.weight.data.to(dtype) * (self.weight.SCB / 127.0).to(dtype)[:, None]
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), weight, bias)

    return RowScaled


def weights(parameter: Tensor) -> int:
    """How many weights a parameter stands for: two of 4 bits lie in one byte; under ZeRO-3 the rest lies elsewhere."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def statistics(parameter: Tensor) -> Iterator[Tensor]:
    """What a quantized parameter needs beside its integers to be read; nothing of a plain one."""
    state, scale = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    if scale is not None:
        yield scale
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.state2.absmax, state.state2.code, state.offset)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters with all that is needed to read them."""
    tensors = [part for p in model.parameters() for part in (p.data, *statistics(p))]
    return sum(part.numel() * part.element_size() for part in tensors)
