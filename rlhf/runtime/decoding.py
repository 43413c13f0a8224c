"""Weights in shares while the policy decodes: gathered whole once a rollout, or a layer at a time in every forward.

Processes decode to different lengths. The hooks that gather and release weights in training wait at every module for
all processes, so they are taken off here. Whole weights then need no other process at all; layer by layer, a process
that is done goes on with forwards that nobody reads until all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.models.load import base_model
from rlhf.runtime import fsdp
from rlhf.runtime.distributed import Runtime

Gather = Callable[[nn.Module], AbstractContextManager[Any]]


@contextmanager
def whole(runtime: Runtime, engine: nn.Module) -> Iterator[None]:
    """Full weights of everything and no collectives inside the block. engine: the policy as ``prepare`` returned it."""
    if runtime.kind == "fsdp2":
        with _without_hooks(runtime, engine), fsdp.whole(engine, fsdp.travelling(runtime.compute_dtype)):
            yield
    elif runtime.kind == "zero3":
        with runtime.gathered(engine), _without_hooks(runtime, engine):
            yield
    else:
        yield


@contextmanager
def by_layer(runtime: Runtime, engine: nn.Module, lm: nn.Module) -> Iterator[None]:
    """What lies in no layer is whole inside the block, a decoder layer only while it computes.

    Every forward of ``lm`` (the causal LM inside ``engine``) waits for one of every other process; on leaving, a
    process takes part in the forwards that others still need.
    """
    if not runtime.sharded:
        yield
        return
    inner: Any = base_model(lm)
    layers = fsdp.decoder_layers(inner)
    decoder = getattr(inner, inner.base_model_prefix)
    rest, gather = (_unsharded(engine), _unsharded) if runtime.kind == "fsdp2" else (_rest(inner, layers), _gathered)
    with _without_hooks(runtime, engine), rest, _gathering(layers, gather), _in_step(decoder, runtime):
        yield


@contextmanager
def _in_step(decoder: nn.Module, runtime: Runtime) -> Iterator[None]:
    """An exception leaves at once: the process ends, and its launcher ends the others."""

    def anybody(working: bool) -> bool:
        return bool(runtime.max(torch.tensor(float(working), device=runtime.device)) > 0)

    def wait(module: nn.Module, inputs: Any) -> None:
        anybody(True)

    handle = decoder.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()
    nothing = torch.zeros(1, 1, dtype=torch.long, device=runtime.device)
    while anybody(False):
        decoder(input_ids=nothing, use_cache=False)


@contextmanager
def _gathering(layers: Sequence[nn.Module], gather: Gather) -> Iterator[None]:
    """Each layer's weights are there from the start of its forward to the end."""
    open_: dict[int, AbstractContextManager[Any]] = {}

    def before(layer: nn.Module, inputs: Any) -> None:
        open_[id(layer)] = gather(layer)
        open_[id(layer)].__enter__()

    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        open_.pop(id(layer)).__exit__(None, None, None)

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_hooks(runtime: Runtime, engine: nn.Module) -> AbstractContextManager[None]:
    return fsdp.without_hooks(engine) if runtime.kind == "fsdp2" else _without_zero3_hooks(engine)


@contextmanager
def _without_zero3_hooks(engine: nn.Module) -> Iterator[None]:
    offload = cast(Any, engine).optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()


def _rest(model: nn.Module, layers: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """All that is in no layer, a tied head once."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return _together([parameter for parameter in model.parameters() if id(parameter) not in inside])


def _gathered(layer: nn.Module) -> AbstractContextManager[Any]:
    return _together(list(layer.parameters()))


def _together(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return gathered if parameters else nullcontext()


@contextmanager
def _unsharded(module: nn.Module) -> Iterator[None]:
    """A module's own group of weights; those of the layers below it are groups of their own."""
    group = cast(Any, module)
    group.unshard()
    try:
        yield
    finally:
        group.reshard()
