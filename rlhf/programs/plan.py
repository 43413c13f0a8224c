"""``rlhf plan``: what a recipe holds and how long a step takes on a machine that need not be at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from rlhf.assemble import planning
from rlhf.assemble.shapes import Shapes
from rlhf.errors import ExitCode, UserError
from rlhf.locate import accelerate_config_file
from rlhf.models.load import quiet_libraries
from rlhf.planning import cards, changes
from rlhf.planning.placement import Placement, read_placement
from rlhf.planning.plan import Plan, make_plan
from rlhf.planning.setup import Machine
from rlhf.planning.sizes import parse_bytes, shown
from rlhf.programs import plan_show
from rlhf.programs.hub import offline_reason
from rlhf.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """gpus: of a node; 0 = this machine's CPU. gpu: a card's name. memory: of one GPU, as typed. accelerate: a
    configuration by name or path; None = the first of one process, ZeRO-2, ZeRO-3 that fits."""

    gpus: int = 0
    memory: str | None = None
    nodes: int = 1
    accelerate: str | None = None
    gpu: str | None = None

    def machine(self) -> Machine:
        """Raises UserError where the memory of a GPU is not known."""
        if self.gpus == 0 and self.gpu is None and self.memory is None:
            return Machine(gpus=1, memory=float(psutil.virtual_memory().total), cpu=True)
        known = cards.card(self.gpu) if self.gpu is not None else None
        if self.memory is None and known is None:
            raise UserError("how much memory has a GPU? set --gpu-memory 80GiB, or name the card with --gpu h100")
        memory = float(parse_bytes(self.memory)) if self.memory is not None else known.memory  # type: ignore[union-attr]
        return Machine(gpus=max(1, self.gpus), memory=memory, nodes=self.nodes, card=self.gpu)


def main(recipe: Recipe, folder: Path, options: Options, *, as_json: bool = False) -> ExitCode:
    """Prints the plan. Raises UserError, after the table, where the run cannot fit."""
    quiet_libraries()
    plan = plan_of(recipe, options, folder)
    change = changes.smallest(plan.setup)
    if as_json:
        print(json.dumps(plan_show.as_json(plan, change), indent=1))
    else:
        plan_show.show(plan, change, chosen=options.accelerate is None)
    if not plan.fits:
        raise UserError(refusal(plan, change))
    return ExitCode.DONE


def plan_of(recipe: Recipe, options: Options, folder: Path, shapes: Shapes | None = None) -> Plan:
    """The plan of a recipe on the machine of the options. Raises UserError where options or models say too little."""
    machine = options.machine()
    known = shapes or Shapes(folder, online=lambda: offline_reason(_hub_ids(recipe)) is None)
    processes = machine.gpus * machine.nodes
    if options.accelerate is not None:
        file = accelerate_config_file(options.accelerate)
        placement = read_placement(file, processes)
        return _planned(recipe, placement, machine, known, options)
    if machine.cpu or processes == 1:
        return _planned(recipe, Placement(kind="single", cpu=machine.cpu), machine, known, options)
    plans = (
        _planned(recipe, Placement(kind=kind, processes=processes), machine, known, options)
        for kind in ("zero2", "zero3")
    )
    first = next(plans)
    return first if first.fits or first.setup.unshardable else next(plans)


def _planned(recipe: Recipe, placement: Placement, machine: Machine, shapes: Shapes, options: Options) -> Plan:
    """A configuration for the CPU says itself how many processes share this machine's memory."""
    if placement.cpu:
        given = parse_bytes(options.memory) if options.memory else psutil.virtual_memory().total / placement.processes
        machine = Machine(gpus=placement.processes, memory=float(given), cpu=True)
    if recipe.batch.prompts_per_step % placement.processes:
        raise UserError(
            f"batch.prompts_per_step={recipe.batch.prompts_per_step} does not divide over {placement.processes} "
            f"processes; set a multiple of {placement.processes}"
        )
    return make_plan(planning.setup(recipe, replace(placement, cpu=machine.cpu), machine, shapes))


def refusal(plan: Plan, change: changes.Change | None) -> str:
    """One line: by how much it does not fit, and what to set."""
    what = (
        f"does not fit: {plan.peak.name} holds {shown(plan.peak.total)}, {shown(-plan.spare)} more than a process may"
    )
    if change is None:
        return f"{what}; nothing that was tried fits: a smaller model, or more GPUs"
    return f"{what}; set {' '.join(change.set)} ({change.what})"


def _hub_ids(recipe: Recipe) -> list[str]:
    paths = [recipe.policy.path, recipe.policy.tokenizer, recipe.reference.path]
    paths += [*(entry.path for entry in recipe.reward.models), *(judge.path for judge in recipe.eval.models)]
    return [path for path in paths if path is not None]
