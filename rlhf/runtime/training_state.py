"""Weights and optimizer moments as plain named tensors, whatever holds them: the content of a checkpoint.

The names are the model's own and the tensors whole, so a checkpoint does not depend on the number of processes or the
way of sharding that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.runtime import fsdp
from rlhf.runtime.distributed import Runtime, unwrap

MOMENTS = ("exp_avg", "exp_avg_sq")


def collect(runtime: Runtime, model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """{"model": {name: weight}, "optimizer": {"name.exp_avg": …, "step": …}} on CPU; on ranks other than 0 empty.

    Every rank must call it: parts are gathered one parameter at a time.
    """
    _ensure_moments(runtime, model)
    files: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, parameter in _trained(model):
        weight, moments = _read(runtime, optimizer, parameter)
        if runtime.main:
            files["model"][name] = weight.detach().to("cpu", copy=True)
            for key, value in moments.items():
                files["optimizer"][f"{name}.{key}"] = value.detach().to("cpu", copy=True)
    if runtime.main:
        files["optimizer"]["step"] = torch.tensor(_optimizer_step(optimizer))
    return files


def restore(runtime: Runtime, model: nn.Module, optimizer: Any, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Puts ``collect``'s tensors back. Every rank passes the same files.

    Raises UserError where names or shapes are not the model's.
    """
    weights, moments = files["model"], files["optimizer"]
    names = {name for name, _ in _trained(model)}
    if names != set(weights):
        odd = sorted(names ^ set(weights))[:3]
        raise UserError(f"the checkpoint's weights are not this model's (first differences: {', '.join(odd)})")
    _ensure_moments(runtime, model)
    for name, parameter in _trained(model):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the own part is flat
        if shape != tuple(weights[name].shape):
            raise UserError(f"the checkpoint's {name} is {tuple(weights[name].shape)}, and this model's is {shape}")
        own = {key: moments[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in moments}
        _write(runtime, optimizer, parameter, weights[name], own)
    set_optimizer_step(optimizer, float(moments["step"]))


def set_optimizer_step(optimizer: Any, step: float) -> None:
    """Sets Adam's step count (bias correction) wherever the optimizer keeps it."""
    for state in _base(optimizer).state.values():
        if "step" in state:
            value = state["step"]
            state["step"] = torch.full_like(value, step) if isinstance(value, Tensor) else type(value)(step)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in unwrap(model).named_parameters() if p.requires_grad)


def _base(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _optimizer_step(optimizer: Any) -> float:
    steps = [float(state["step"]) for state in _base(optimizer).state.values() if "step" in state]
    return max(steps, default=0.0)


def _ensure_moments(runtime: Runtime, model: nn.Module) -> None:
    """ZeRO keeps moments on flat partitions and makes them at the first step; reading or writing needs them before.

    DeepSpeed tells parameters where their moments are once, after the first step of the first parameter group, when
    later groups (a critic's) have none yet; so they are told here, each time.
    """
    if not runtime.deepspeed:
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = cast(Any, model).optimizer
    flat = zero.fp32_partitioned_groups_flat if runtime.sharded else zero.single_partition_of_fp32_groups
    for index, partition in enumerate(flat):
        if partition not in zero.optimizer.state:
            moments = {key: torch.zeros_like(partition) for key in MOMENTS}
            zero.optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if not runtime.sharded:
            lazy_init_hp_params_optimizer_state(zero.bit16_groups[index], partition, zero.optimizer.state)


def _read(runtime: Runtime, optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
    if not runtime.deepspeed:
        state = _base(optimizer).state.get(parameter, {})
        own = {key: fsdp.full_tensor(state[key]) for key in MOMENTS if key in state}
        return fsdp.full_tensor(parameter), own
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weight = cast(Tensor, safe_get_full_fp32_param(parameter))
    return weight, {key: cast(Tensor, safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}


@torch.no_grad()
def _write(
    runtime: Runtime, optimizer: Any, parameter: nn.Parameter, weight: Tensor, moments: Mapping[str, Tensor]
) -> None:
    if not runtime.deepspeed:
        parameter.copy_(fsdp.share_of(weight, parameter))
        if moments:
            step = torch.tensor(0.0)
            own = {key: fsdp.share_of(value, parameter) for key, value in moments.items()}
            _base(optimizer).state[parameter] = {"step": step, **own}
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, weight.to(runtime.device))  # the master copy that the optimizer steps
    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=runtime.sharded):
        parameter.data.copy_(weight)  # the copy that forwards read; it is rewritten only after a step
    for key, value in moments.items():
        safe_set_full_optimizer_state(parameter, value.to(runtime.device), key)
