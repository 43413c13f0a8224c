"""Roles and phases: which model holds what on one process, and the peak of each part of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.models.quantized import Bits
from rlhf.planning import layers
from rlhf.planning.layers import Forward, Regime
from rlhf.planning.placement import Held, Units, held
from rlhf.planning.rollouts import Decoding, decoding
from rlhf.planning.setup import Judge, Setup, forwards, own_prompts, scoring
from rlhf.planning.shapes import Shape

# Of a GPU's memory: the CUDA context with its libraries and the buffers of NCCL; and what the allocator cannot use,
# because free blocks have the wrong sizes. Both are rules of thumb, not measured here.
CONTEXT, FRAGMENTS = 1.5 * 2**30, 0.05
_COPIES = "weights as products read them"


@dataclass(frozen=True)
class Role:
    """What one model holds on a process through the whole run, bytes by name. where: how it is placed."""

    name: str
    model: str
    where: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Phase:
    """One part of a step: bytes by name beyond what the roles hold."""

    name: str
    held: float
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return self.held + sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The bytes of one process. host: of its node's memory, for what is offloaded, all processes together."""

    setup: Setup
    roles: tuple[Role, ...]
    phases: tuple[Phase, ...]
    decoding: Decoding | None
    forward: Forward
    microbatches: int
    host: float

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def usable(self) -> float:
        """Bytes that tensors may fill."""
        machine = self.setup.machine
        return machine.memory if machine.cpu else (machine.memory - CONTEXT) * (1 - FRAGMENTS)

    @property
    def spare(self) -> float:
        """Bytes that are left at the peak; negative = it does not fit."""
        return self.usable - self.peak.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0


def make_plan(setup: Setup) -> Plan:
    """Everything that can be said of a setup's memory."""
    state = _state(setup)
    roles = _roles(setup, state)
    base = sum(role.total for role in roles) + _rollout_record(setup)
    forward, count = forwards(setup)
    found = decoding(setup) if setup.sampled and setup.rollouts.engine in ("loop", "generate") else None
    phases = [
        *_generation(setup, state, base, found),
        *_scoring(setup, base),
        *_reference(setup, state, base, forward),
        _update(setup, state, base, forward, count),
        _stepping(setup, state, base),
    ]
    frozen = [setup.reference_held, *map(setup.judge_held, setup.judges)]
    away = sum(each.host for each in frozen if each is not None)
    host = (state.host + away) * min(setup.machine.gpus, setup.placement.processes)
    if setup.step.activations == "offload":
        host += setup.policy.layers * setup.regime.stream * setup.policy.hidden * forward.tokens
    return Plan(setup, tuple(roles), tuple(phases), found, forward, count, host)


def _state(setup: Setup) -> Held:
    embedding = 0 if setup.rank else setup.policy.vocab * setup.policy.hidden
    largest = max(embedding, 0 if setup.rank else setup.policy.largest)
    return held(
        setup.placement,
        setup.frozen,
        setup.trained,
        largest,
        low=setup.low,
        packed=setup.packed,
        units=_units(setup),
    )


def _units(setup: Setup) -> Units:
    models = [setup.policy, *([setup.critic] if setup.critic else [])]
    return Units(max(model.layer for model in models), sum(model.parameters - model.trunk for model in models))


def _roles(setup: Setup, state: Held) -> list[Role]:
    """Policy and critic are one trained model; the others are whole on every process."""
    name = setup.policy.name + (f" + adapter of rank {setup.rank}" if setup.rank else "")
    name = f"{setup.bits} {name}" if setup.bits else name
    name += f" + critic {setup.critic.name}" if setup.critic else ""
    parts = {"weights": state.weights, "optimizer": state.optimizer}
    if state.gradients_stay:
        parts |= {"gradients": state.gradients, "buckets": state.buckets}
    elif setup.placement.kind == "ddp":
        parts["buckets"] = state.buckets
    if setup.vectors:
        parts["copies of weights"] = 4.0 * setup.vectors * setup.trained
    roles = [Role("policy", name, setup.placement.said, parts)]
    if setup.reference is not None and setup.reference_held is not None:
        own = setup.reference_held
        roles.append(Role("reference", setup.reference.name, own.said, {"weights": own.always}))
    for judge in setup.judges:
        own = setup.judge_held(judge)
        roles.append(Role("reward model", judge.shape.name, own.said, {"weights": own.always}))
    if setup.sampled and setup.rollouts.engine == "vllm":
        roles.append(Role("vLLM", setup.policy.name, "in this process", {"weights, keys, values": _vllm(setup)}))
    return roles


def _vllm(setup: Setup) -> float:
    """Its share of a GPU; on a CPU its copy of the weights and its cache."""
    if not setup.machine.cpu:
        return setup.rollouts.gpu_fraction * setup.machine.memory
    return setup.policy.parameters * setup.regime.product + max(setup.rollouts.kv_bytes, 2.0**30)


def _rollout_record(setup: Setup) -> float:
    """Ids, masks and what is known of every completion token."""
    step = setup.step
    rows = own_prompts(setup) * step.rows
    return float(rows * (9 * (step.prompt + step.completion) + 24 * step.completion))


def _generation(setup: Setup, state: Held, base: float, found: Decoding | None) -> list[Phase]:
    if not setup.sampled:
        return []
    gathered = state.by_layer if setup.rollouts.by_layer and found is not None else state.whole
    words = "weights gathered by layer" if setup.rollouts.by_layer else "weights gathered whole"
    parts = {words: gathered, _COPIES: _cast(setup, in_loop=True)}
    if found is not None:
        parts |= {"keys and values": found.cache, "prompts read, next tokens": max(found.reading, found.choosing)}
    return [Phase("generation", base, _said(parts))]


def _cast(setup: Setup, *, in_loop: bool) -> float:
    """bfloat16 copies of float32 weights: all trained ones while autocast remembers them, else one matrix at a time."""
    if setup.bits is not None:
        return layers.copies(setup.policy, setup.regime, cached=False, bits=setup.bits)
    cached = not setup.rank and (in_loop or setup.step.activations == "keep")
    kept = setup.rank and not in_loop and setup.step.activations == "keep"  # frozen ones that backward needs
    return layers.copies(setup.policy, setup.regime, cached=bool(cached or kept))


def _scoring(setup: Setup, base: float) -> list[Phase]:
    if not setup.judges or not setup.sampled:
        return []
    return [
        Phase(
            "scoring",
            base,
            max((_judging(setup, judge) for judge in setup.judges), key=lambda parts: sum(parts.values())),
        )
    ]


def _judging(setup: Setup, judge: Judge) -> dict[str, float]:
    """Beyond what always lies there: weights that are gathered or moved in, and a forward."""
    forward, _ = scoring(setup, judge)
    regime = setup.judge_regime(judge)
    cast = layers.copies(judge.shape, regime, cached=False, bits=judge.bits)
    found = cast + layers.passing(judge.shape, regime, forward, setup.tile)
    return _said({"weights of the reward model": setup.judge_held(judge).used, "one forward": found})


def _reference(setup: Setup, state: Held, base: float, forward: Forward) -> list[Phase]:
    """The reference's pass; and the policy's own where values or old log-probabilities are asked for."""
    if not setup.compares:
        return []
    if setup.reference is not None and setup.reference_held is not None:
        own = {"weights of the reference": setup.reference_held.used}
        parts = {**own, **_pass(setup.reference, setup.frozen_regime, setup, forward, setup.reference_bits)}
    else:
        own_pass = _pass(setup.policy, setup.regime, setup, forward, setup.bits)
        parts = {"weights gathered": state.gathered, **own_pass}
    return [Phase("reference", base, _said(parts))]


def _pass(shape: Shape, regime: Regime, setup: Setup, forward: Forward, bits: Bits | None) -> dict[str, float]:
    cast = layers.copies(shape, regime, cached=False, bits=bits)
    return {_COPIES: cast, "one forward": layers.passing(shape, regime, forward, setup.tile)}


def _update(setup: Setup, state: Held, base: float, forward: Forward, count: int) -> Phase:
    """At the start of the last backward. With one forward a step gradients grow while activations go, so that either
    the activations or the gradients are the most; with several both are there."""
    step, regime = setup.step, setup.regime
    kept = layers.activations(setup.policy, regime, forward, step.activations, setup.rank)
    if setup.critic is not None:
        kept += layers.activations(setup.critic, regime, forward, step.activations)
    head = layers.head_bytes(setup.policy, forward, setup.tile, reference=setup.exact)
    first = _head_gradient(setup)
    gradients = 0.0 if state.gradients_stay else state.gradients
    if count == 1 and not setup.placement.deepspeed:
        early = first + kept + head
        late = {"gradients": gradients, "activations": kept / max(1, setup.policy.layers), "output head": 0.0}
        early_parts = {"gradients": first, "activations": kept, "output head": head}
        parts = early_parts if early >= sum(late.values()) else late
    else:
        own = first if setup.placement.processes > 1 else 0.0
        parts = {"gradients": gradients + own, "activations": kept, "output head": head}
    if not state.gradients_stay and setup.placement.lowers:
        parts["buckets"] = state.buckets
    parts |= {"weights gathered": state.gathered, _COPIES: _cast(setup, in_loop=False)}
    return Phase("update", base, _said(parts))


def _head_gradient(setup: Setup) -> float:
    """Of the output head's weight, which comes before all others: into the gradient itself with one process, else into
    a buffer of its own that waits for the embedding's where the two are tied."""
    if setup.rank or setup.policy.scalar:
        return 0.0
    size = 2 if setup.placement.lowers and setup.low else 4
    return float(size * setup.policy.head)


def _stepping(setup: Setup, state: Held, base: float) -> Phase:
    gradients = 0.0 if state.gradients_stay else state.gradients
    return Phase("optimizer step", base, _said({"gradients": gradients, "square roots, copies": state.stepping}))


def _said(parts: Mapping[str, float]) -> dict[str, float]:
    """What is there at all."""
    return {name: size for name, size in parts.items() if size > 0}
