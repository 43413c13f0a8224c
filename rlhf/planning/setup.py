"""What is planned: models, sizes of a step, and the machine. Plain values that a recipe was turned into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.models import masks
from rlhf.models.layout import SharedPrompts, Size, plain_rows
from rlhf.models.quantized import Bits
from rlhf.planning.frozen import FrozenHeld, Where, beside_held, frozen_held
from rlhf.planning.layers import AUTOCAST, BFLOAT16, FLOAT32, Activations, Forward, Regime
from rlhf.planning.placement import Placement
from rlhf.planning.shapes import Shape
from rlhf.runtime.microbatches import pack

Program = Literal["policy", "preference", "sft", "reward"]
LONGEST_SHARED = 4096  # tokens of a row of a reward model (rlhf.rewards.model)
CPU_TILE, GPU_TILE = 2**20, 256 * 2**20  # rlhf.models.head
CPU_NOISE, GPU_NOISE = 2**22, 2**28  # working buffers of the sampling noise (rlhf.sampling.noise)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """gpus: a node's, or processes of a CPU. memory: bytes of one. card: name in ``cards``; None = no time is told."""

    gpus: int
    memory: float
    nodes: int = 1
    card: str | None = None
    cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A frozen reward model. tokens: of one forward. key: of its place in the recipe. bits: of quantized weights. rank:
    of its adapter, where it lies on the policy's base."""

    shape: Shape
    tokens: int
    where: Where = "replicate"
    key: str = "reward.models.0"
    bits: Bits | None = None
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """Sizes of a step, global. rows: completions of a prompt (sft: 1, pairs: 2). prompt, completion: longest, tokens.
    microbatch: tokens of a forward. parts: optimizer steps that share a rollout's rows (PPO's minibatches)."""

    prompts: int
    rows: int
    prompt: int
    completion: int
    microbatch: int
    share_prompts: bool = True
    activations: Activations = "keep"
    parts: int = 1
    updates: int = 1


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """How completions are sampled. loop: ours; generate: of transformers; vllm: in this process; server: elsewhere.
    by_layer: weights in shares are gathered a layer at a time, in every forward."""

    engine: Literal["loop", "generate", "vllm", "server"] = "loop"
    kv_bytes: float = 4.0 * 2**30
    gpu_fraction: float = 0.4
    by_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run. rank: of the policy's adapter, 0 = all weights are trained. reference: its shape; None = the policy with
    its adapter off, or none at all (``compares`` tells). low: bfloat16 arithmetic. exact: the reference runs beside the
    update. vectors: further copies of the trained weights (step limits, TRPO). bits: of the quantized weights below the
    policy's adapter; reference_bits: of those of a reference of its own."""

    program: Program
    policy: Shape
    step: Step
    placement: Placement
    machine: Machine
    rollouts: Rollouts = Rollouts()
    reference: Shape | None = None
    reference_where: Where = "replicate"
    compares: bool = True
    critic: Shape | None = None
    judges: tuple[Judge, ...] = ()
    rank: int = 0
    low: bool = True
    exact: bool = False
    vectors: int = 0
    bits: Bits | None = None
    reference_bits: Bits | None = None

    @property
    def sampled(self) -> bool:
        return self.program == "policy"

    @property
    def adapter(self) -> int:
        return self.policy.adapter(self.rank)

    @property
    def trained(self) -> int:
        """Weights that are trained, a critic's included; beside an adapter a new score head is trained whole."""
        own = self.policy.parameters if not self.rank else self.adapter
        own += self.policy.head if self.rank and self.policy.scalar else 0
        return own + (self.critic.parameters if self.critic else 0)

    @property
    def frozen(self) -> int:
        """In whole weights."""
        if not self.rank:
            return 0
        return self.policy.parameters - (self.policy.packable if self.bits else 0)

    @property
    def packed(self) -> float:
        """Bytes of the policy's quantized weights."""
        return self.policy.packed(self.bits) if self.bits else 0.0

    @property
    def tile(self) -> int:
        return CPU_TILE if self.machine.cpu else GPU_TILE

    @property
    def noise(self) -> int:
        return CPU_NOISE if self.machine.cpu else GPU_NOISE

    @property
    def regime(self) -> Regime:
        """Of the trained model: weights of the arithmetic's type, or float32 ones under autocast."""
        if not self.low:
            return FLOAT32
        return BFLOAT16 if self.placement.lowers else AUTOCAST

    @property
    def frozen_regime(self) -> Regime:
        """Of the reference, whose weights are float32 whatever the engine's are."""
        return AUTOCAST if self.low else FLOAT32

    @property
    def reference_held(self) -> FrozenHeld | None:
        """Of the reference's own weights, where it has any."""
        if self.reference is None:
            return None
        return frozen_held(self.reference, 4, self.reference_where, self.placement, self.reference_bits)

    @property
    def unshardable(self) -> bool:
        """Whether ZeRO-3 cannot hold the policy: quantized weights, or a base that a reward model shares."""
        return self.bits is not None or self.shares_base

    @property
    def shares_base(self) -> bool:
        return any(judge.where == "policy_base" for judge in self.judges)

    def judge_held(self, judge: Judge) -> FrozenHeld:
        if judge.where == "policy_base":
            return beside_held(judge.shape, judge.rank, 2 if self.low and self.placement.deepspeed else 4)
        return frozen_held(judge.shape, self.judge_bytes(judge), judge.where, self.placement, judge.bits)

    def judge_bytes(self, judge: Judge) -> int:
        """Of a reward model's weight: as stored, or float32 where that is computed in."""
        return judge.shape.stored_bytes if self.low else 4

    def judge_regime(self, judge: Judge) -> Regime:
        if judge.where == "policy_base":
            return self.regime
        if not self.low:
            return FLOAT32
        return BFLOAT16 if judge.shape.stored_bytes == 2 else AUTOCAST


def known(shape: Shape) -> bool:
    """Whether decode loop and shared rows take this model."""
    return shape.family in masks.FAMILIES and shape.attention in masks.KERNELS


def own_prompts(setup: Setup) -> int:
    """Prompts of one process."""
    return max(1, setup.step.prompts // setup.placement.processes)


def forwards(setup: Setup) -> tuple[Forward, int]:
    """The largest forward of an update, and how many a process runs an optimizer step, cut as the updater cuts it."""
    step = setup.step
    shared = _shares(setup)
    cost = shared.cells if shared else plain_rows.cells
    unit = Size.of([step.prompt] * step.rows, [step.completion] * step.rows)
    cuts = pack([unit] * max(1, own_prompts(setup) // step.parts), step.microbatch, cost)
    units = max(map(len, cuts))
    rows, width = units * step.rows, step.prompt + step.completion
    if shared and cost(unit) != plain_rows.cells(unit):
        forward = Forward(units, unit.longest, rows * step.completion, shared=True)
    else:
        forward = Forward(rows, width, rows * step.completion)
    return forward, len(cuts)


def _shares(setup: Setup) -> SharedPrompts | None:
    """Only policies' completions share rows; demonstrations and a reward model's pairs do not."""
    if not setup.step.share_prompts or setup.program in ("sft", "reward"):
        return None
    models = [model for model in (setup.policy, setup.reference, setup.critic) if model is not None]
    return SharedPrompts() if all(map(known, models)) else None


def scoring(setup: Setup, judge: Judge) -> tuple[Forward, int]:
    """The largest forward of a reward model, and how many a process runs a step; its tokens taken as the policy's."""
    step = setup.step
    together = min(step.rows, max(1, (LONGEST_SHARED - step.prompt) // step.completion)) if known(judge.shape) else 1
    width = step.prompt + together * step.completion
    groups = own_prompts(setup) * -(-step.rows // together)
    rows = max(1, min(groups, judge.tokens // width))
    return Forward(rows, width, rows * together, shared=together > 1), -(-groups // rows)
