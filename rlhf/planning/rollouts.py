"""Bytes of a rollout: keys and values, prompts being read, logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.planning.layers import Forward, passing
from rlhf.planning.setup import Setup, own_prompts

PREFILL = 16384  # prompt tokens of one forward (rlhf.sampling.loop)


@dataclass(frozen=True)
class Decoding:
    """rows: decoded at once. wanted: that a process has in a step. cache: bytes of keys and values. needed: if all rows
    decoded at once. reading: while prompts are read. choosing: logits and noise of one token."""

    rows: int
    wanted: int
    cache: float
    needed: float
    reading: float
    choosing: float


def decoding(setup: Setup) -> Decoding:
    """Of our loop, or of ``generate``, which repeats a prompt for each of its completions and keeps logits twice."""
    step, shape = setup.step, setup.policy
    wanted = own_prompts(setup) * step.rows
    row = _row_bytes(setup)
    if setup.rollouts.engine == "generate":
        width = step.prompt + step.completion
        rows = min(wanted, max(step.rows, min(512, 4 * step.microbatch // width)))
        prompts, repeated = rows, 2.0  # DynamicCache appends by copying
    else:
        rows = min(wanted, max(1, int(setup.rollouts.kv_bytes // _budgeted(setup))))
        prompts, repeated = min(-(-rows // step.rows), max(1, PREFILL // step.prompt)), 1.0
    first = Forward(prompts, step.prompt, prompts)
    captured = prompts * row * step.prompt / (step.prompt + step.completion) if repeated == 1.0 else 0.0
    reading = captured + passing(shape, setup.regime, first, 0)
    copies = (3 if shape.softcap else 2) * setup.regime.product
    logits = min(rows, setup.noise // 16 // shape.vocab + 1) * 16 * shape.vocab
    choosing = float(rows * shape.vocab * copies + logits)
    per_layer = row / shape.layers
    cache = rows * row + (repeated - 1) * rows * per_layer
    return Decoding(rows, wanted, cache, wanted * row, reading, choosing)


def _row_bytes(setup: Setup) -> float:
    """Keys and values of one row at full length. Under autocast keys are float32 (rotary positions are) and values
    bfloat16."""
    shape, step = setup.policy, setup.step
    key = setup.regime.stream
    return float(shape.layers * shape.keys * (key + setup.regime.product) * (step.prompt + step.completion))


def _budgeted(setup: Setup) -> float:
    """What the loop takes a row for when it counts rows into the budget: two numbers of the products' type."""
    shape, step = setup.policy, setup.step
    return float(2 * setup.regime.product * shape.layers * shape.keys * (step.prompt + step.completion))
