"""Bytes of a rollout: keys and values, prompts being read, logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.planning.layers import Forward, passing
from rlhf.planning.setup import Setup, own_prompts

PREFILL = 16384  # prompt tokens of one forward (rlhf.sampling.loop)


@dataclass(frozen=True)
class Decoding:
    """rows: decoded at once. wanted: that a process has in a step. cache: bytes of keys and values. needed: if all rows
    were decoded at once. reading: beyond the cache while prompts are read. choosing: logits and noise of one token."""

    rows: int
    wanted: int
    cache: float
    needed: float
    reading: float
    choosing: float


def decoding(setup: Setup) -> Decoding:
    """Of our loop, or of ``generate``."""
    return _generate(setup) if setup.rollouts.engine == "generate" else _loop(setup)


def _loop(setup: Setup) -> Decoding:
    """Buffers of full length are there from the start; prompts are read once, beside them."""
    step = setup.step
    wanted, row = own_prompts(setup) * step.rows, _row_bytes(setup)
    rows = min(wanted, max(1, int(setup.rollouts.kv_bytes // _budgeted(setup))))
    prompts = min(-(-rows // step.rows), max(1, PREFILL // step.prompt))
    read = passing(setup.policy, setup.regime, Forward(prompts, step.prompt, prompts), 0)
    captured = prompts * row * step.prompt / (step.prompt + step.completion)
    return Decoding(rows, wanted, rows * row, wanted * row, captured + read, _choosing(setup, rows))


def _generate(setup: Setup) -> Decoding:
    """A prompt is read once for each of its completions; the cache grows by copying, a layer at a time."""
    step = setup.step
    wanted, row, width = own_prompts(setup) * step.rows, _row_bytes(setup), step.prompt + step.completion
    rows = min(wanted, max(step.rows, min(512, 4 * step.microbatch // width)))
    cache = rows * row * (1 + 1 / setup.policy.layers)
    read = passing(setup.policy, setup.regime, Forward(rows, step.prompt, rows), 0)
    beyond = max(0.0, read - rows * row * step.completion / width)  # the cache is short while prompts are read
    return Decoding(rows, wanted, cache, wanted * row, beyond, _choosing(setup, rows))


def _choosing(setup: Setup, rows: int) -> float:
    """Logits of the rows, twice (three times with a soft-cap), and the noise's working buffers."""
    vocab = setup.policy.vocab
    copies = (3 if setup.policy.softcap else 2) * setup.regime.product
    return float(rows * vocab * copies + 16 * vocab * min(rows, setup.noise // 16 // vocab + 1))


def _row_bytes(setup: Setup) -> float:
    """Keys and values of one row at full length. Under autocast keys are float32 (rotary positions are) and values
    bfloat16."""
    shape, step = setup.policy, setup.step
    numbers = setup.regime.stream + setup.regime.product
    return float(shape.row * numbers * (step.prompt + step.completion))


def _budgeted(setup: Setup) -> float:
    """What the loop takes a row for when it counts rows into the budget: two numbers of the products' type."""
    shape, step = setup.policy, setup.step
    return float(2 * setup.regime.product * shape.row * (step.prompt + step.completion))
