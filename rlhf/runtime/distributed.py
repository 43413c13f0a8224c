"""One process or several, plain, DDP, DeepSpeed ZeRO or FSDP2, behind one small object.

What starts a run silently wrong here is checked at the start: a launcher that started one process, ranks that do not
train together, a DeepSpeed request that was dropped (docs/troubleshooting.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.runtime import fsdp

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Runtime:
    """The process group and the device. Implements ``interfaces.Collective``. compute_dtype: of the trained model."""

    accelerator: Any
    kind: Kind
    device: torch.device
    rank: int = 0
    world_size: int = 1
    compute_dtype: torch.dtype = torch.float32

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether weights are whole on no process."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    def gather(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        pieces = [torch.empty_like(value) for _ in range(self.world_size)]
        torch.distributed.all_gather(pieces, value.contiguous())
        return torch.cat(pieces)

    def sum(self, value: Tensor) -> Tensor:
        return self._reduce(value, torch.distributed.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduce(value, torch.distributed.ReduceOp.MAX)

    def _reduce(self, value: Tensor, op: Any) -> Tensor:
        if self.world_size == 1:
            return value
        result = value.clone().contiguous()
        torch.distributed.all_reduce(result, op=op)
        return result

    def gather_objects(self, value: Any) -> list[Any]:
        """One JSON-like object from every rank, in rank order (tensors travel through ``gather``)."""
        if self.world_size == 1:
            return [value]
        pieces: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(pieces, value)
        return pieces

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()

    def share(self, items: int, what: str) -> slice:
        """This rank's contiguous part of ``items``. Raises UserError where they do not divide."""
        if items % self.world_size:
            nearest = max(self.world_size, items - items % self.world_size)
            raise UserError(
                f"batch.prompts_per_step={items}: {what} do not divide over {self.world_size} processes; "
                f"set batch.prompts_per_step={nearest} or {nearest + self.world_size}"
            )
        size = items // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Full weights on every rank inside the block, to be read."""
        if self.kind == "fsdp2":
            with fsdp.whole(model):
                yield
        elif self.kind == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield
        else:
            yield

    def describe(self) -> str:
        if self.world_size == 1:
            return f"1 process on {self.device.type}, policy {_POLICY[self.kind]}"
        backend = torch.distributed.get_backend()
        return f"{self.world_size} processes on {self.device.type} over {backend}, policy {_POLICY[self.kind]}"


_POLICY: Mapping[Kind, str] = {
    "single": "whole",
    "ddp": "whole on each (DDP)",
    "zero1": "whole on each, its optimizer state in shares (ZeRO-1)",
    "zero2": "whole on each, its gradients and optimizer state in shares (ZeRO-2)",
    "zero3": "in shares, with its gradients and optimizer state (ZeRO-3)",
    "fsdp2": "in shares, with its gradients and optimizer state (FSDP2)",
}


def start(*, max_grad_norm: float | None, compute_dtype: torch.dtype, timeout_seconds: float = 1800.0) -> Runtime:
    """Joins the process group that the launcher described in the environment, and checks that it is what it says."""
    wants_deepspeed, wants_fsdp = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true", fsdp.asked_for()
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        if wants_deepspeed:
            compile_nothing()
    with fsdp.kept_from_accelerate() if wants_fsdp else contextlib.nullcontext():
        accelerator = _accelerator(wants_deepspeed, on_cpu, compute_dtype, timeout_seconds)
    if wants_deepspeed:
        _configure_deepspeed(accelerator, max_grad_norm)
    runtime = Runtime(
        accelerator=accelerator,
        kind=_kind(accelerator, wants_fsdp),
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        compute_dtype=compute_dtype,
    )
    _check(runtime, wants_deepspeed)
    return runtime


def _accelerator(wants_deepspeed: bool, on_cpu: bool, compute_dtype: torch.dtype, timeout_seconds: float) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    timeout = timedelta(seconds=timeout_seconds)
    group = (
        InitProcessGroupKwargs(backend="gloo", timeout=timeout) if on_cpu else InitProcessGroupKwargs(timeout=timeout)
    )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Under DeepSpeed the engine owns the low-precision copy; elsewhere ScoredModel's own autocast, or ``fsdp.shard``.
    mixed = "bf16" if wants_deepspeed and compute_dtype == torch.bfloat16 else "no"
    with quiet_stdout():
        return Accelerator(
            cpu=on_cpu and not wants_deepspeed,  # with cpu=True accelerate drops DeepSpeed without a word
            mixed_precision=mixed,
            kwargs_handlers=[group] if several or wants_deepspeed else [],
        )


def compile_nothing() -> None:
    """Keeps DeepSpeed from compiling a shared-memory all-reduce when the group starts: only its inference uses it.

    The compilation takes half a minute and a C++ compiler, and one that was killed leaves a lock file in the user's
    cache at which every later start waits without end and without a word.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _configure_deepspeed(accelerator: Any, max_grad_norm: float | None) -> None:
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    plugin.deepspeed_config["gradient_clipping"] = float(max_grad_norm or 0.0)
    plugin.deepspeed_config["gradient_accumulation_steps"] = 1  # the updater drives the engine itself
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # nothing reads it; DeepSpeed wants one
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Else transformers would shard every model it loads, the frozen ones too, whose engine never gathers them.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


def _kind(accelerator: Any, wants_fsdp: bool) -> Kind:
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        return cast(Kind, f"zero{accelerator.state.deepspeed_plugin.zero_stage}")
    if accelerator.num_processes == 1:
        return "single"
    return "fsdp2" if wants_fsdp else "ddp"


def _check(runtime: Runtime, wants_deepspeed: bool) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if runtime.world_size != launched:
        raise UserError(
            f"the launcher started {launched} processes but accelerate sees {runtime.world_size}: "
            "use one of accelerate_configs/*.yaml (`MULTI_CPU` configs start a single process)"
        )
    if wants_deepspeed and not runtime.deepspeed:
        raise UserError(
            "the launch asks for DeepSpeed but accelerate dropped it: use accelerate_configs/cpu_zero2.yaml"
        )
    if runtime.world_size > 1:
        total = runtime.sum(torch.tensor(float(runtime.rank + 1), device=runtime.device)).item()
        expected = runtime.world_size * (runtime.world_size + 1) / 2
        if total != expected:
            raise UserError(
                f"an all-reduce over {runtime.world_size} processes gave {total}, not {expected}: the ranks do not "
                "form one group; launch with `accelerate launch --config_file accelerate_configs/….yaml`"
            )


def prepare(runtime: Runtime, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Wraps model and optimizer for this process group and checks that the wrapper is the expected one."""
    if runtime.kind == "single":
        return model.to(runtime.device), optimizer
    if runtime.kind == "fsdp2":
        fsdp.shard(model, optimizer, runtime.device, runtime.compute_dtype)
        return model, optimizer
    with quiet_stdout():
        wrapped, wrapped_optimizer = runtime.accelerator.prepare(model, optimizer)
    expected = "DeepSpeedEngine" if runtime.deepspeed else "DistributedDataParallel"
    if type(wrapped).__name__ != expected:
        raise UserError(
            f"{runtime.world_size} processes, but the model was wrapped as {type(wrapped).__name__}, not {expected}: "
            "the ranks would not train together; use one of accelerate_configs/*.yaml"
        )
    return wrapped, wrapped_optimizer


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP or a DeepSpeed engine."""
    return cast(nn.Module, model.module) if hasattr(model, "module") else model


def auto_dtype(name: str) -> torch.dtype:
    """``auto``: bfloat16 where the hardware computes in it (CUDA sm80+), else float32; a name is taken as it is."""
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """DeepSpeed and accelerate print set-up notes to stdout, which belongs to the run's own lines."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def leave(runtime: Runtime) -> None:
    """Takes this process out of the group, so that the next run in it can join another."""
    if runtime.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
