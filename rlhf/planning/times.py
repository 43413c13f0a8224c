"""Seconds of a step from operations and bytes: an order of magnitude, at full lengths and assumed shares of peaks."""

from __future__ import annotations

from rlhf.planning import cards
from rlhf.planning.cards import Card
from rlhf.planning.layers import Forward
from rlhf.planning.plan import Plan
from rlhf.planning.rollouts import decoding
from rlhf.planning.setup import Setup, forwards, own_prompts, scoring
from rlhf.planning.shapes import Shape


def seconds(plan: Plan) -> dict[str, float]:
    """Phase → seconds; empty where no card was named."""
    setup = plan.setup
    if setup.machine.card is None:
        return {}
    known = cards.card(setup.machine.card)
    found = {"generation": _generation(setup, known)} if setup.sampled else {}
    if setup.judges and setup.sampled:
        found["scoring"] = sum(_forward_flops(judge.shape, *_cells(*scoring(setup, judge))) for judge in setup.judges)
        found["scoring"] /= cards.FORWARD_MFU * known.flops
    if setup.compares:
        shape = setup.reference or setup.policy
        cells, positions = _step_cells(setup)
        found["reference"] = _forward_flops(shape, cells, positions) / (cards.FORWARD_MFU * known.flops)
    found["update"] = _update(setup, known)
    return found


def _cells(forward: Forward, count: int) -> tuple[float, float]:
    return float(forward.tokens * count), float(forward.positions * count)


def _step_cells(setup: Setup) -> tuple[float, float]:
    """(tokens, statistics) of all forwards of a process that see each row once."""
    forward, count = forwards(setup)
    cells, positions = _cells(forward, count)
    return cells * setup.step.parts, positions * setup.step.parts


def _forward_flops(shape: Shape, cells: float, positions: float) -> float:
    """2 a weight and token; the output head at positions only. Attention's own products are left out: at rows of a few
    thousand tokens they are a tenth."""
    return 2.0 * (shape.trunk * cells + shape.head * positions)


def _update(setup: Setup, known: Card) -> float:
    """Backward is two forwards; one where weights are frozen; recomputing is one more."""
    cells, positions = _step_cells(setup)
    passes = (2.0 if setup.rank else 3.0) + (0.0 if setup.step.activations == "keep" else 1.0)
    work = passes * _forward_flops(setup.policy, cells, positions)
    if setup.critic is not None:
        work += (passes + 1.0 if setup.rank else passes) * _forward_flops(setup.critic, cells, 0.0)
    times = setup.step.updates / setup.step.parts
    return times * (work / (cards.TRAIN_MFU * known.flops) + _traffic(setup, known))


def _traffic(setup: Setup, known: Card) -> float:
    """Seconds that a step's gradients, and under ZeRO-3 and FSDP2 its weights, are on the way."""
    placement = setup.placement
    if placement.processes == 1:
        return 0.0
    size = 2.0 if setup.low and placement.lowers else 4.0
    _, count = forwards(setup)
    numbers = 2.0 * setup.trained
    if placement.sharded:
        again = 2.0 if setup.step.activations == "keep" else 3.0
        numbers += count * again * (setup.trained + setup.frozen)
    elif placement.deepspeed:
        numbers += max(0, count - 1) * setup.trained * (1.0 if placement.kind == "zero2" else 0.0)
    return size * numbers / _link(setup, known)


def _link(setup: Setup, known: Card) -> float:
    """Bytes a second between processes."""
    return cards.LINK * (known.link if setup.machine.nodes == 1 else min(known.link, cards.BETWEEN_NODES))


def _generation(setup: Setup, known: Card) -> float:
    """Every token reads the weights once, and the keys and values so far; prompts are read like any forward. Layers
    that are gathered in every forward come over the link first."""
    step, shape = setup.step, setup.policy
    found = decoding(setup)
    waves = found.wanted / found.rows
    weights = setup.regime.product * (shape.trunk + shape.head)
    read = weights + found.cache / 2
    operations = 2.0 * found.rows * (shape.trunk + shape.head) / (cards.FORWARD_MFU * known.flops)
    token = max(read / (cards.DECODE_BANDWIDTH * known.bandwidth), operations) + cards.LAUNCH_SECONDS * shape.layers
    if setup.rollouts.by_layer and setup.placement.sharded:
        token += setup.regime.product * shape.trunk / _link(setup, known)
    prompts = own_prompts(setup) * (1 if setup.rollouts.engine != "generate" else step.rows)
    first = _forward_flops(shape, prompts * step.prompt, prompts) / (cards.FORWARD_MFU * known.flops)
    return waves * step.completion * token + first
