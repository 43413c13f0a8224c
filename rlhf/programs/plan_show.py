"""How ``rlhf plan`` shows a plan: tables on a terminal, plain columns elsewhere, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf.planning import cards, changes, times
from rlhf.planning.changes import Change
from rlhf.planning.plan import CONTEXT, FRAGMENTS, Plan
from rlhf.planning.shapes import Shape
from rlhf.planning.sizes import shown


def show(plan: Plan, change: Change | None, *, chosen: bool) -> None:
    """Prints models, phases and the verdict. chosen: the placement is ours, not the user's."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    for line in _facts(plan, chosen):
        console.print(line)
    console.print(_roles(plan, plain=not console.is_terminal))
    console.print(_phases(plan, plain=not console.is_terminal))
    for line in _verdict(plan, change):
        console.print(line)


def _facts(plan: Plan, chosen: bool) -> list[str]:
    setup = plan.setup
    machine, step = setup.machine, setup.step
    where = "processes of this CPU" if machine.cpu else "GPUs"
    size = f"{setup.placement.processes} {where}, {shown(machine.memory)} each, {shown(plan.usable)} for tensors"
    tokens = f"{step.prompts} prompts × {step.rows} rows of up to {step.prompt} + {step.completion} tokens"
    forward = f"{plan.forward.rows} × {plan.forward.width} tokens, {plan.microbatches} a process"
    lines = [
        f"machine   {size}",
        f"placement {setup.placement.said}{' (chosen here; --accelerate names another)' if chosen else ''}",
        f"step      {tokens}; forwards of {forward}; activations: {step.activations}",
    ]
    return [*lines, *(f"model     {_described(shape)}" for shape in _shapes(plan))]


def _shapes(plan: Plan) -> list[Shape]:
    setup = plan.setup
    found = [setup.policy, setup.reference, setup.critic, *(judge.shape for judge in setup.judges)]
    return list(dict.fromkeys(shape for shape in found if shape is not None))


def _described(shape: Shape) -> str:
    size, unit = (1e9, "billion") if shape.parameters >= 1e9 else (1e6, "million")
    numbers = f"{shape.parameters / size:.3g} {unit} weights, {shape.layers} layers, {shape.attention} attention"
    return f"{shape.name}: {numbers} ({shape.source})"


def _table(title: str, plain: bool, *columns: str) -> Table:
    table = Table(title=None if plain else title, box=None if plain else box.SIMPLE_HEAD, title_justify="left")
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at < 2 else "right", overflow="fold")
    return table


def _roles(plan: Plan, plain: bool) -> Table:
    names = list(dict.fromkeys(name for role in plan.roles for name in role.parts))
    table = _table("Held by a process through the whole run", plain, "role", "model", *names, "together")
    for role in plan.roles:
        table.add_row(role.name, role.model, *(_cell(role.parts.get(name)) for name in names), shown(role.total))
    return table


def _phases(plan: Plan, plain: bool) -> Table:
    seconds = times.seconds(plan)
    table = _table("Peak of each part of a step", plain, "phase", "beyond what is held", "peak", "time")
    for phase in plan.phases:
        parts = ", ".join(f"{name} {shown(size)}" for name, size in phase.parts.items())
        took = f"{seconds[phase.name]:.1f} s" if phase.name in seconds else ""
        table.add_row(phase.name, parts, shown(phase.total), took)
    return table


def _cell(size: float | None) -> str:
    return "" if not size else shown(size)


def _verdict(plan: Plan, change: Change | None) -> list[str]:
    lines = []
    if plan.fits:
        lines.append(f"fits: {shown(plan.peak.total)} at the peak ({plan.peak.name}), {shown(plan.spare)} to spare")
        lines.append(_suggestion(plan))
    else:
        lines.append(
            f"does not fit: {shown(plan.peak.total)} at the peak ({plan.peak.name}), {shown(-plan.spare)} more"
        )
        if change is not None:
            lines.append(f"smallest change: {change.what}: {' '.join(change.set)}")
    if plan.host:
        lines.append(f"host memory: {shown(plan.host)} a node for what is taken off the GPUs")
    if not plan.setup.machine.cpu:
        lines.append(
            f"assumed: {shown(CONTEXT)} of each GPU for CUDA, {FRAGMENTS:.0%} that the allocator cannot use; every row "
            "as long as the recipe allows"
        )
    return [*lines, *_time(plan)]


def _suggestion(plan: Plan) -> str:
    budget = changes.largest_microbatch(plan)
    text = f"room for: batch.microbatch_tokens={budget}"
    if plan.decoding is not None and plan.setup.rollouts.engine == "loop":
        found = plan.decoding
        cache = changes.largest_cache(plan)
        text += f", rollout.kv_cache_gib={cache:.3g} ({found.rows} of {found.wanted} rows decode at once now)"
    kind = plan.setup.placement.kind
    config = {"single": "cpu" if plan.setup.machine.cpu else "single_gpu", "ddp": None}.get(kind, kind)
    return f"{text}, --accelerate {config}" if config and not plan.setup.machine.cpu else text


def _time(plan: Plan) -> list[str]:
    seconds, name = times.seconds(plan), plan.setup.machine.card
    if not seconds or name is None:
        return []
    card = cards.card(name)
    return [
        f"a step: about {sum(seconds.values()):.0f} s, if training reaches {cards.TRAIN_MFU:.0%} and forwards "
        f"{cards.FORWARD_MFU:.0%} of {card.flops / 1e12:.0f} TFLOP/s, decoding {cards.DECODE_BANDWIDTH:.0%} of "
        f"{card.bandwidth / 1e12:.2f} TB/s ({card.source}); assumed, not measured"
    ]


def as_json(plan: Plan, change: Change | None) -> dict[str, Any]:
    """Everything that the tables show, in bytes and seconds."""
    setup = plan.setup
    return {
        "fits": plan.fits,
        "peak": {"phase": plan.peak.name, "bytes": round(plan.peak.total)},
        "usable_bytes": round(plan.usable),
        "spare_bytes": round(plan.spare),
        "host_bytes": round(plan.host),
        "placement": {"kind": setup.placement.kind, "processes": setup.placement.processes},
        "models": {shape.name: {"parameters": shape.parameters, "source": shape.source} for shape in _shapes(plan)},
        "roles": [{"name": role.name, "model": role.model, "bytes": _rounded(role.parts)} for role in plan.roles],
        "phases": [
            {"name": phase.name, "held_bytes": round(phase.held), "bytes": _rounded(phase.parts)}
            | {"peak_bytes": round(phase.total)}
            for phase in plan.phases
        ],
        "forward": {"rows": plan.forward.rows, "width": plan.forward.width, "count": plan.microbatches},
        "seconds": {name: round(value, 2) for name, value in times.seconds(plan).items()},
        "change": None if change is None else {"what": change.what, "set": list(change.set)},
    }


def _rounded(parts: Mapping[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items()}
