"""Before a run: whether it can fit the memory that is really there, by its plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from rlhf.assemble import planning
from rlhf.assemble.shapes import Shapes
from rlhf.errors import UserError
from rlhf.planning import changes
from rlhf.planning.placement import Placement, from_zero
from rlhf.planning.plan import make_plan
from rlhf.planning.setup import Machine
from rlhf.planning.sizes import shown
from rlhf.recipe import Recipe
from rlhf.runtime.distributed import Runtime


def refuse_what_cannot_fit(recipe: Recipe, runtime: Runtime, note: Callable[[str], None]) -> None:
    """Raises UserError where the peak of the plan is beyond all memory of the smallest device; the allowances of
    ``rlhf plan`` are not asked for, because a plan may be a tenth too high. Every process comes to the same answer.

    A model of which no plan can be made is told and not refused.
    """
    wanted = recipe.run.memory_check
    on_cpu = runtime.device.type == "cpu"
    if wanted == "never" or (wanted == "auto" and on_cpu):
        return
    memory = -float(runtime.max(torch.tensor(-_memory(runtime), dtype=torch.float64, device=runtime.device)))
    local = max(1, runtime.world_size if on_cpu else torch.cuda.device_count())
    nodes = max(1, runtime.world_size // local)
    machine = Machine(gpus=min(local, runtime.world_size), nodes=nodes, memory=memory, cpu=on_cpu)
    try:
        plan = make_plan(planning.setup(recipe, placement_of(runtime), machine, Shapes(Path.cwd())))
    except UserError as error:
        note(f"memory is not checked: {str(error).splitlines()[0]}")
        return
    if plan.peak.total <= memory:
        return
    change = changes.smallest(plan.setup)
    advice = f"set {' '.join(change.set)} ({change.what})" if change is not None else "take a smaller model"
    raise UserError(
        f"this run cannot fit: {plan.peak.name} would hold {shown(plan.peak.total)} of a device that has "
        f"{shown(memory)} (`rlhf plan` shows what); {advice}, or set run.memory_check=never to try it anyway"
    )


def placement_of(runtime: Runtime) -> Placement:
    """How this process group shares the trained model."""
    cpu = runtime.device.type == "cpu"
    if not runtime.deepspeed:
        return Placement(kind=runtime.kind, processes=runtime.world_size, cpu=cpu)
    zero = runtime.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization") or {}
    return from_zero({**zero, "stage": int(runtime.kind[-1])}, runtime.world_size, cpu)


def _memory(runtime: Runtime) -> float:
    """All bytes of this process's device; of a CPU its share."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.mem_get_info(runtime.device)[1])
    return float(psutil.virtual_memory().total) / runtime.world_size
