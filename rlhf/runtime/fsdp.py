"""The policy in shares by torch's own ``fully_shard`` (FSDP2): decoder layers one by one, and the rest together.

It is called here and not through accelerate, whose FSDP needs a GPU to act: so a test on two CPU processes runs what a
machine of GPUs runs. Weights are DTensors outside a forward, cut along their first dimension.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.errors import UserError

# What accelerate's launcher says of its ``fsdp_config``, with the only value that acts here.
_ASKED: Mapping[str, tuple[str, str]] = {
    "FSDP_VERSION": ("2", "FSDP1 keeps weights flat, without names"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on their device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "batch.activations says what is held of a layer"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "weights are in shares outside a forward"),
}


def asked_for() -> bool:
    """Whether the launcher asks for FSDP. Raises UserError for settings that have no part in what is done here."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    for name, (value, why) in _ASKED.items():
        given = os.environ.get(name, "1" if name == "FSDP_VERSION" else value).lower()
        if given != value:
            raise UserError(
                f"fsdp_config: {name.lower()}={given}: {why}; set {value}, as accelerate_configs/fsdp2.yaml"
            )
    return True


@contextmanager
def kept_from_accelerate() -> Iterator[None]:
    """Inside it accelerate makes its process group as for DDP. transformers is told for good not to load weights on the
    first process alone, which accelerate would hand out later."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    asked = os.environ.pop("ACCELERATE_USE_FSDP")
    try:
        yield
    finally:
        os.environ["ACCELERATE_USE_FSDP"] = asked


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Cuts the model's weights over all processes, in place, and hands the shares to an optimizer that has not stepped.

    compute_dtype: bfloat16 weights travel and are multiplied as such; shares, gradients that meet and moments are
    float32. Tied weights must be used in no layer: they lie in the root's group.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": _precision(compute_dtype)}
    for layer in decoder_layers(model):
        fully_shard(layer, **settings)
    # True for the root as well: else its weights stay whole after a forward without backward, and the optimizer steps
    # shares that the next forward would not read.
    fully_shard(model, reshard_after_forward=True, **settings)
    cast(
        Any, model
    )._get_fsdp_state()._lazy_init()  # else the first layer that decoding calls would be taken for a root
    shares = dict(model.named_parameters())
    if not all(isinstance(share, DTensor) for share in shares.values()):
        raise UserError("fully_shard left weights whole: the processes would not share them; use zero3 or ddp")
    for group in optimizer.param_groups:
        group["params"] = [shares[names[id(parameter)]] for parameter in group["params"]]


def travelling(compute_dtype: torch.dtype) -> torch.dtype | None:
    """The type of whole weights where it is not the shares' own."""
    return compute_dtype if compute_dtype in (torch.bfloat16, torch.float16) else None


def _precision(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    low = travelling(compute_dtype)
    if low is None:
        return MixedPrecisionPolicy()
    # Inputs are left alone: the model's own autocast decides what is computed in which type.
    return MixedPrecisionPolicy(low, reduce_dtype=torch.float32, cast_forward_inputs=False)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """What transformers says not to split: the decoder layers of every model inside, a critic's too."""
    kinds: set[str] = set()
    for module in model.modules():
        kinds |= set(getattr(module, "_no_split_modules", None) or ())
    # ``fully_shard`` puts a class of its own in front of a module's.
    return [module for module in model.modules() if kinds & {each.__name__ for each in type(module).__mro__}]


@contextmanager
def whole(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside it parameters are plain tensors, whole on every process, of ``dtype`` (None: as the shares are). What is
    written to them is lost."""
    found: dict[int, nn.Parameter] = {}
    places = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None
    ]
    for _, _, share in places:
        if id(share) not in found:  # tied weights stay tied
            full = full_tensor(share).to(dtype or share.dtype)
            found[id(share)] = nn.Parameter(full, requires_grad=share.requires_grad)
    for module, name, share in places:
        module._parameters[name] = found[id(share)]
    try:
        yield
    finally:
        for module, name, share in places:
            module._parameters[name] = share


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside it no module gathers or releases its weights when it is called."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a share; every process must ask. Other tensors as they are."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor that every process has; where ``like`` is a share, this process's share of it."""
    if not isinstance(like, DTensor):
        return value.to(like.device, copy=True)
    cut = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(cut)  # not a view that keeps the whole alive
