"""The smallest change that would make a run fit: tried in one order, alone first, then each on top of those before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rlhf.planning.plan import Plan, make_plan
from rlhf.planning.setup import Setup

LORA_RANK = 16


@dataclass(frozen=True)
class Change:
    """what: for people. set: recipe keys and options that make it, as typed."""

    what: str
    set: tuple[str, ...]
    setup: Setup


Step = Callable[[Setup], Change | None]


def recompute(setup: Setup) -> Change | None:
    if setup.step.activations != "keep":
        return None
    step = replace(setup.step, activations="recompute")
    return Change("layers are computed again in backward", ("batch.activations=recompute",), replace(setup, step=step))


def zero2(setup: Setup) -> Change | None:
    """Gradients and optimizer state in shards."""
    if setup.placement.processes == 1 or setup.placement.kind not in ("single", "ddp", "zero1") or setup.vectors:
        return None
    return _placed(setup, "zero2")


def zero3(setup: Setup) -> Change | None:
    """Weights in shards too."""
    if setup.placement.processes == 1 or setup.placement.sharded or setup.vectors:
        return None
    return None if setup.unshardable else _placed(setup, "zero3")


def frozen_shares(setup: Setup) -> Change | None:
    """Reference and reward models in shards too; judges of held-out completions have no place of their own."""
    if setup.placement.processes == 1:
        return None
    keys, judges = [], list(setup.judges)
    for at, judge in enumerate(judges):
        if judge.where not in ("zero3", "policy_base") and judge.key.startswith("reward.") and judge.bits is None:
            keys.append(f"{judge.key}.placement=zero3")
            judges[at] = replace(judge, where="zero3")
    found = replace(setup, judges=tuple(judges))
    whole = setup.reference is not None and setup.reference_bits is None
    if whole and not setup.exact and setup.reference_where != "zero3":
        keys.append("reference.placement=zero3")
        found = replace(found, reference_where="zero3")
    return Change("reference and reward models in shards", tuple(keys), found) if keys else None


def smaller_microbatch(setup: Setup) -> Change | None:
    """Halved until a forward holds one unit; the largest that fits."""
    for budget in _halves(setup.step.microbatch):
        step = replace(setup.step, microbatch=budget)
        judges = tuple(replace(judge, tokens=min(judge.tokens, budget)) for judge in setup.judges)
        found = replace(setup, step=step, judges=judges)
        change = Change("fewer tokens a forward; the gradient stays", (f"batch.microbatch_tokens={budget}",), found)
        if make_plan(found).fits:
            return change
    return change if setup.step.microbatch > 1024 else None


def smaller_cache(setup: Setup) -> Change | None:
    """Fewer rows decoded at once; the largest cache that fits."""
    if not setup.sampled or setup.rollouts.engine != "loop":
        return None
    change = None
    for part in (2, 4, 8, 16):
        size = setup.rollouts.kv_bytes / part
        found = replace(setup, rollouts=replace(setup.rollouts, kv_bytes=size))
        change = Change("fewer rows decoded at once", (f"rollout.kv_cache_gib={size / 2**30:g}",), found)
        if make_plan(found).fits:
            return change
    return change


def by_layer(setup: Setup) -> Change | None:
    """Weights in shares gathered a layer at a time while decoding."""
    own, decodes = setup.rollouts, setup.sampled and setup.rollouts.engine in ("loop", "generate")
    if not setup.placement.sharded or not decodes or own.by_layer:
        return None
    found = replace(setup, rollouts=replace(own, by_layer=True))
    return Change("weights gathered a layer at a time while decoding", ("rollout.gather=layers",), found)


def offload(setup: Setup) -> Change | None:
    """Optimizer state in host memory."""
    if not setup.placement.deepspeed or setup.placement.offload_optimizer or setup.machine.cpu:
        return None
    placement = replace(setup.placement, offload_optimizer=True)
    keys = ("deepspeed_config.offload_optimizer_device: cpu (a copy of the accelerate configuration)",)
    return Change("optimizer state in host memory", keys, replace(setup, placement=placement))


def lora(setup: Setup) -> Change | None:
    """An adapter in place of all weights; the reference is then the policy without it."""
    if setup.rank or setup.policy.source == "recipe" or setup.policy.scalar:
        return None
    found = replace(setup, rank=LORA_RANK, reference=None)
    return Change("an adapter is trained, and the reference is the policy without it", ("policy.lora.r=16",), found)


def qlora(setup: Setup) -> Change | None:
    """The weights below an adapter in 4 bits."""
    served = setup.rollouts.engine in ("vllm", "server")
    if not setup.rank or setup.unshardable or setup.policy.scalar or setup.placement.sharded or served:
        return None
    what = "the frozen weights below the adapter in 4 bits"
    return Change(what, ("policy.quantize=4bit",), replace(setup, bits="4bit"))


def quantized_judges(setup: Setup) -> Change | None:
    """Reward models in 8 bits."""
    open_ = [judge for judge in setup.judges if judge.bits is None and judge.where == "replicate"]
    if not open_ or not setup.sampled:
        return None
    judges = tuple(replace(judge, bits="8bit") if judge in open_ else judge for judge in setup.judges)
    keys = tuple(f"{judge.key}.quantize=8bit" for judge in open_)
    return Change("the reward models in 8 bits", keys, replace(setup, judges=judges))


def reward_server(setup: Setup) -> Change | None:
    """Reward models on another machine."""
    if not setup.judges or not setup.sampled:
        return None
    what = "the reward models on a machine of their own"
    keys = tuple(f"{judge.key}.url=http://…" for judge in setup.judges)
    return Change(what, keys, replace(setup, judges=()))


def more_gpus(setup: Setup) -> Change | None:
    """Twice, four, eight times as many under ZeRO-3; as far as the step's prompts divide."""
    if setup.vectors or setup.machine.cpu or setup.unshardable:
        return None
    for times in (2, 4, 8):
        processes = setup.placement.processes * times
        if setup.step.prompts % processes:
            break
        machine = replace(setup.machine, nodes=setup.machine.nodes * times)
        placement = replace(setup.placement, processes=processes, kind="zero3")
        found = replace(setup, machine=machine, placement=placement)
        keys = (f"--nodes {machine.nodes}", "--accelerate zero3")
        if make_plan(found).fits:
            return Change(f"{processes} GPUs", keys, found)
    return None


ORDER: tuple[Step, ...] = (
    *(
        recompute,
        zero2,
        zero3,
        frozen_shares,
        smaller_microbatch,
        smaller_cache,
        by_layer,
        offload,
        lora,
        qlora,
        quantized_judges,
        reward_server,
        more_gpus,
    ),
)


def smallest(setup: Setup) -> Change | None:
    """The first change in ``ORDER`` that fits alone; else the changes one on top of the other until it does. None where
    nothing does, and where the setup fits already."""
    if make_plan(setup).fits:
        return None
    for change in _alone(setup):
        if make_plan(change.setup).fits:
            return change
    return _together(setup)


def _alone(setup: Setup) -> Iterator[Change]:
    yield from (change for step in ORDER if (change := step(setup)) is not None)


def _together(setup: Setup) -> Change | None:
    what: list[str] = []
    keys: dict[str, None] = {}
    for step in ORDER:
        change = step(setup)
        if change is None:
            continue
        setup = change.setup
        if any(key.startswith("--accelerate") for key in change.set):  # the later one stands
            keys = {key: None for key in keys if not key.startswith("--accelerate")}
        what, keys = [*what, change.what], {**keys, **dict.fromkeys(change.set)}
        if make_plan(setup).fits:
            return Change("; ".join(what), tuple(keys), setup)
    return None


def _placed(setup: Setup, kind: str) -> Change:
    placement = setup.placement.at(kind)  # type: ignore[arg-type]
    words = {
        "zero2": "gradients and optimizer state in shards",
        "zero3": "weights, gradients, optimizer state in shards",
    }
    return Change(words[kind], (f"--accelerate {kind}",), replace(setup, placement=placement))


def _halves(tokens: int) -> list[int]:
    found = [tokens]
    while found[-1] > 1024:
        found.append(found[-1] // 2)
    return found[1:] or [tokens]


def largest_microbatch(plan: Plan) -> int:
    """The largest power of two of tokens a forward, up to 64k, with which the update fits; the given one where none."""
    setup = plan.setup
    for budget in (65536, 32768, 16384, 8192, 4096, 2048, 1024):
        if make_plan(replace(setup, step=replace(setup.step, microbatch=budget))).fits:
            return budget
    return setup.step.microbatch


def largest_cache(plan: Plan) -> float:
    """GiB of keys and values that fit, no more than all rows of a step need; 0 where nothing is decoded here."""
    if plan.decoding is None:
        return 0.0
    phase = next(phase for phase in plan.phases if phase.name == "generation")
    room = plan.usable - phase.total + plan.decoding.cache
    return max(0.0, min(room * 0.9, plan.decoding.needed)) / 2**30
