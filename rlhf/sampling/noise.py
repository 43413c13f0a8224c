"""Sampling noise as a pure function of where the token stands: (seed, step, slot, sample, position, token id).

A token is drawn by racing exponentials: with E_v independent Exp(1), argmax_v π(v)/E_v ~ π, the same draw as
argmax_v logits_v/T + Gumbel_v. Because E_v is computed from a counter and not taken from a generator, a completion does
not depend on the rank, the batch it is decoded in, the device or the tokens drawn before, and a rounding error in one
logit moves only draws that were nearly tied (inverse-CDF sampling moves about 5e-3 of all draws at a 256k vocabulary).

Two stages. A row key and then a position key are 64-bit hashes (SplitMix64's finaliser: Steele, Lea and Flood 2014),
one per row. The token stage has to visit R·V elements, so it is six 32-bit integer operations: multiply, xor-shift,
multiply, xor-shift. Both multipliers are drawn anew for every row and position, so no pair of tokens keeps a fixed
relation between its noises, as it would under one fixed multiplier.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
# Elements of a row block. Its working buffers are 16 bytes an element in fp32: 4 MiB on a CPU, inside a last-level
# cache (smaller blocks pay for dispatch), and 256 MiB on a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 24
_CHUNK = 64
# 2^-31 one ulp down: the largest 31-bit integer rounds to 2^31 in fp32, and u must stay below 1.
MINUS_SCALE = -(2.0**-31) * (1 - 2.0**-24)


def row_keys(seed: int, step: int, slots: Tensor, samples: Tensor) -> Tensor:
    """[R] int64: one 64-bit key per row, from the prompt's slot in the global step and the sample's index within it.

    ``slots`` and ``samples`` are [R] integers; any Python integer is a seed (taken modulo 2^64).
    """
    keys = torch.zeros_like(slots, dtype=torch.long)
    for value in (seed, step, slots.long(), samples.long()):
        keys = _absorb(keys, value)
    return keys


def position_keys(rows: Tensor, position: int | Tensor) -> Tensor:
    """[R] int64: keys of one completion position (0 = first completion token), from the rows' keys."""
    return _absorb(rows, position)


def exponentials(keys: Tensor, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[R, V] Exp(1) noise of the given position keys, for tests and for reading what a draw was made from."""
    work = Workspace(keys.shape[0], vocab_size, dtype, keys.device)
    return -work.negative_exponentials(_multipliers(keys))


@torch.no_grad()
def sample_tokens(
    logits: Tensor, temperature: float, keys: Tensor | None, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token per row from π_T = softmax(logits / T); ``keys=None`` takes the most likely one.

    logits [R, V] of any float type, computed in fp32 or wider; keys [R] int64 from :func:`position_keys`;
    ``workspace`` from :meth:`Workspace.like` of such logits saves allocating one (a decode loop keeps it).
    Returns tokens [R] int64 and log π_T(token) [R] in nats (fp32, or float64 for float64 logits).
    """
    work = workspace or Workspace.like(logits)
    multipliers = None if keys is None else _multipliers(keys)
    drawn = []
    for start in range(0, logits.shape[0], work.rows):
        part = slice(start, start + work.rows)
        drawn.append(work.draw(logits[part], temperature, None if multipliers is None else multipliers[:, part]))
    tokens, probabilities = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return tokens, probabilities.log_()


class Workspace:
    """Buffers of one row block, reused from block to block so that each of them stays in cache."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.vocab = rows, vocab
        self.hashes = _token_hashes(vocab, device)
        self.bits = torch.empty(rows, vocab, dtype=torch.int32, device=device)
        self.shifted = torch.empty_like(self.bits)
        self.minus_half = torch.tensor(-(2.0**-32), dtype=dtype, device=device)
        self.probabilities = torch.empty(rows, vocab, dtype=dtype, device=device)
        # Padded with zeros to whole chunks: a race value is negative, so padding never wins.
        self.race = torch.zeros(rows, -(-vocab // _CHUNK) * _CHUNK, dtype=dtype, device=device)

    @classmethod
    def like(cls, logits: Tensor) -> Workspace:
        """For logits of this width, type and device; a block has as many rows as stay in cache."""
        rows, vocab = logits.shape
        elements = _CPU_BLOCK if logits.device.type == "cpu" else _GPU_BLOCK
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return cls(max(1, min(rows, elements // max(vocab, 1))), vocab, dtype, logits.device)

    def draw(self, logits: Tensor, temperature: float, multipliers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [b] and their probabilities [b] for a block of at most ``rows`` rows."""
        probabilities, race = self.probabilities[: logits.shape[0]], self.race[: logits.shape[0]]
        if temperature != 1.0 or logits.dtype != probabilities.dtype:
            logits = race[:, : self.vocab].copy_(logits).div_(temperature)
        torch.softmax(logits, -1, out=probabilities)
        if multipliers is None:
            tokens = logits.argmax(-1)
        else:
            noise = self.negative_exponentials(multipliers)
            torch.div(probabilities, noise, out=noise)
            tokens = _argmin(race)
        return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1)

    def negative_exponentials(self, multipliers: Tensor) -> Tensor:
        """−E [b, V] = log(1 − u) with u = (y + ½)·2^-31 and y a uniform 31-bit integer.

        Taken as log1p(−u), which keeps its relative precision as u → 0, where winners are.
        """
        rows = multipliers.shape[1]
        bits, shifted, noise = self.bits[:rows], self.shifted[:rows], self.race[:rows, : self.vocab]
        torch.mul(self.hashes, multipliers[0], out=bits)
        # bits is odd here, and x ^ (x >> 15) with the arithmetic shift identifies only x with ~x, so nothing collides.
        bits.bitwise_xor_(torch.bitwise_right_shift(bits, 15, out=shifted))
        bits.mul_(multipliers[1])
        # The same identification is wanted here: it makes a non-negative, uniform 31-bit integer with no masking.
        bits.bitwise_xor_(torch.bitwise_right_shift(bits, 16, out=shifted))
        noise.copy_(bits)
        torch.add(self.minus_half, noise, alpha=MINUS_SCALE, out=noise)
        return noise.log1p_()


def _argmin(race: Tensor) -> Tensor:
    """[b] index of the smallest value (of the first NaN where there is one, so never one of the padding).

    A vectorised minimum per chunk goes first, because ``argmin`` is not vectorised.
    """
    chunks = race.view(race.shape[0], -1, _CHUNK)
    best = chunks.amin(-1).argmin(-1)
    inner = chunks[torch.arange(race.shape[0], device=race.device), best].argmin(-1)
    return best * _CHUNK + inner


def _multipliers(keys: Tensor) -> Tensor:
    """[2, R, 1] int32: the low and the high half of the 64-bit keys, made odd."""
    return (torch.stack((keys << 32, keys)) >> 32).to(torch.int32).bitwise_or_(1)[..., None]


@lru_cache(maxsize=8)
def _token_hashes(vocab: int, device: torch.device) -> Tensor:
    """[V] int32, odd and all different: 2·b(v) + 1 with b a bijection of 31-bit integers."""
    mask = 0x7FFFFFFF
    value = torch.arange(1, vocab + 1, dtype=torch.long, device=device)
    for multiplier, shift in ((0x2C1B3C6D, 12), (0x297A2D39, 15)):
        value = ((value ^ (value >> 16)) * multiplier) & mask
        value = value ^ (value >> shift)
    return _to_int32((value << 1) | 1)


def _absorb(keys: Tensor, value: int | Tensor) -> Tensor:
    """Mixes one more integer into 64-bit keys: SplitMix64's finaliser of keys·odd + golden·(value + 1)."""
    if isinstance(value, int):
        value = torch.tensor(_signed(value), dtype=torch.long, device=keys.device)
    mixed = keys + (value + 1) * _signed(_GOLDEN)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (``>>`` copies the sign bit)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A Python integer modulo 2^64 as the int64 with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _to_int32(value: Tensor) -> Tensor:
    """int64 in [0, 2^32) as the int32 with the same bits."""
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)
