"""Statistics of softmax(W·h) over a large vocabulary, a tile of logits at a time, forwards and backwards.

Logits are never whole: a tile [rows, columns] is made, read and dropped, sums over the vocabulary run along with the
maximum so far (the online softmax of Milakov and Gimelshein 2018), and backward makes every tile again. What is held
beyond weights and their gradient is a tile and a few numbers a position; the tile stays in cache, so that the passes
over it cost little.

With l = logits / T, p = softmax(l), q = softmax(r) of a reference, and gradients g of log p(y) and κ of KL(p‖q):

    ∂/∂l_v = g·(1[v = y] − p_v) + κ·p_v·(log p_v − log q_v − KL)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlhf.interfaces import StatsRequest


class PositionStats(NamedTuple):
    """Statistics per position, [n] each; None = not asked for. A plain tuple of tensors: ZeRO-3 hooks look inside."""

    logprobs: Tensor
    entropy: Tensor | None
    score_norms: Tensor | None
    kl: Tensor | None
    ref_logprobs: Tensor | None


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits. weight [V, H]; bias [V] or None; softcap: cap·tanh(logits / cap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    def tile(self, hidden: Tensor, columns: slice, temperature: float, dtype: torch.dtype) -> Tensor:
        """[rows, columns] logits / T in float32, or float64; the product is taken in ``dtype``."""
        bias = None if self.bias is None else self.bias[columns].to(dtype)
        product = F.linear(hidden, self.weight[columns].to(dtype), bias)
        logits = product if product.dtype == torch.float64 else product.float()
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if temperature == 1.0 else logits.div_(temperature)


@dataclass(frozen=True)
class Plan:
    """What is asked for and how it is cut. elements: of a tile; dtype: of the products; fused: the weight's gradient is
    added to ``weight.grad`` on the spot, with no buffer of its own."""

    request: StatsRequest
    softcap: float | None
    ref_softcap: float | None
    elements: int
    dtype: torch.dtype
    fused: bool = False

    def tiles(self, positions: int, vocab: int) -> Iterator[tuple[slice, slice]]:
        """(rows, columns), close to square; all rows of some columns before the next ones."""
        height = max(1, min(positions, math.isqrt(self.elements)))
        width = max(1, self.elements // height)
        for column in range(0, vocab, width):
            for row in range(0, positions, height):
                yield slice(row, row + height), slice(column, column + width)


class _Sums:
    """Sums over the vocabulary so far, [n] float64 each, relative to the largest logit so far."""

    def __init__(self, like: Tensor) -> None:
        # below any finite logit, and itself finite in float32: a first tile of −inf alone adds nothing
        self.top = like.new_full(like.shape, torch.finfo(torch.float32).min / 2, dtype=torch.float64)
        # Σ e^x, Σ e^x·x, Σ_{v≠y} e^{2x}, Σ e^x·(l − r) with x = l − top; l_y
        self.mass, self.weighted, self.squares, self.gap, self.chosen = self.top.new_zeros(5, *like.shape)

    def add(self, logits: Tensor, rows: slice, start: int, targets: Tensor) -> Tensor:
        """Takes a tile in; returns e^x, [rows, columns]. The tile becomes x."""
        columns = (targets[rows] - start)[:, None]
        inside = (columns >= 0) & (columns < logits.shape[1])
        own = logits.gather(1, columns.clamp(0, logits.shape[1] - 1))
        self.chosen[rows] = torch.where(inside, own.double(), self.chosen[rows, None])[:, 0]
        before = self.top[rows]
        top = torch.maximum(before, logits.amax(1).double())
        shrink = torch.exp(before - top)
        self.weighted[rows] = shrink * (self.weighted[rows] + (before - top) * self.mass[rows])
        self.squares[rows] *= shrink.square()
        self.gap[rows] *= shrink
        exponentials = logits.sub_(top[:, None].to(logits.dtype)).exp()  # a wider operand would slow the pass
        self.mass[rows] = shrink * self.mass[rows] + exponentials.sum(1)
        self.top[rows] = top
        return exponentials

    @property
    def log_total(self) -> Tensor:
        """log Σ e^l."""
        total: Tensor = self.top + self.mass.log()
        return total


class TiledStatistics(torch.autograd.Function):
    """(hidden [n, H], targets [n], a head, and a reference's hidden states and head) → ``PositionStats``.

    Gradients go to hidden, weight and bias, from ``logprobs`` and ``kl``; the rest has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        plan: Plan,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        head, states = Head(weight, bias, plan.softcap), hidden.to(plan.dtype)
        other = ref_states = None
        if ref_hidden is not None and ref_weight is not None:
            other, ref_states = Head(ref_weight, ref_bias, plan.ref_softcap), ref_hidden.to(plan.dtype)
        stats, saved = _forward(head, states, targets, plan, other, ref_states)
        ctx.plan = plan
        ctx.parameter = weight if plan.fused else None  # what hooks make of a saved tensor has another ``grad``
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, *saved)
        ctx.mark_non_differentiable(*(part for part in (stats[1], stats[2], stats[4]) if part is not None))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, *kept = ctx.saved_tensors
        plan, of_logprobs, of_kl = ctx.plan, gradients[0], gradients[3]
        if of_logprobs is None and of_kl is None:
            return (None,) * 8
        slopes = _Slopes(
            head=Head(weight, bias, plan.softcap),
            states=hidden.to(plan.dtype),
            targets=targets,
            plan=plan,
            other=None if ref_weight is None else Head(ref_weight, ref_bias, plan.ref_softcap),
            ref_states=None if ref_hidden is None else ref_hidden.to(plan.dtype),
            total=kept[0],
            ref_total=kept[1],
            kl=kept[2],
            of_logprobs=of_logprobs,
            of_kl=of_kl,
        )
        into = _Into.of(hidden, weight, bias, ctx.needs_input_grad, ctx.parameter)
        for rows, columns in plan.tiles(*hidden.shape[:1], weight.shape[0]):
            tile = slopes.tile(rows, columns).to(plan.dtype)
            into.add(tile, slopes.states[rows], weight[columns].to(plan.dtype), rows, columns)
        return into.hidden_like(hidden), into.returned_weight, into.bias, *[None] * 5


def _forward(
    head: Head, states: Tensor, targets: Tensor, plan: Plan, other: Head | None, ref_states: Tensor | None
) -> tuple[PositionStats, tuple[Tensor | None, ...]]:
    """Statistics, and what backward needs of them: log Σ e^l, log Σ e^r, KL."""
    request, sums = plan.request, _Sums(targets)
    ref_sums = _Sums(targets) if other is not None else None
    for rows, columns in plan.tiles(len(targets), len(head.weight)):
        logits = head.tile(states[rows], columns, request.temperature, plan.dtype)
        gap = None
        if other is not None and ref_states is not None and ref_sums is not None:
            reference = other.tile(ref_states[rows], columns, request.temperature, plan.dtype)
            gap = logits - reference
            ref_sums.add(reference, rows, columns.start, targets)
        exponentials = sums.add(logits, rows, columns.start, targets)
        if request.entropy:
            sums.weighted[rows] += logits.mul_(exponentials).sum(1)
        if gap is not None:
            sums.gap[rows] += gap.mul_(exponentials).sum(1)
        if request.score_norms:
            at = (targets[rows] - columns.start)[:, None]
            outside = (at < 0) | (at >= exponentials.shape[1])
            place = at.clamp(0, exponentials.shape[1] - 1)
            exponentials.scatter_(1, place, exponentials.gather(1, place) * outside)
            sums.squares[rows] += exponentials.square_().sum(1)
    return _statistics(sums, ref_sums, request, torch.promote_types(states.dtype, torch.float32))


def _statistics(
    sums: _Sums, ref_sums: _Sums | None, request: StatsRequest, dtype: torch.dtype
) -> tuple[PositionStats, tuple[Tensor | None, ...]]:
    total = sums.log_total
    logprobs = sums.chosen - total
    entropy = sums.mass.log() - sums.weighted / sums.mass if request.entropy else None
    norms = None
    if request.score_norms:  # (1 − π(y))² + Σ_{v≠y} π(v)²: no cancellation where the token is nearly certain
        norms = torch.expm1(logprobs).square() + sums.squares / sums.mass.square()
    kl = ref_logprobs = ref_total = None
    if ref_sums is not None:
        ref_total = ref_sums.log_total
        kl = (sums.gap / sums.mass - total + ref_total).clamp_min(0.0)
        ref_logprobs = (ref_sums.chosen - ref_total).to(dtype)

    def told(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    stats = PositionStats(logprobs.to(dtype), told(entropy), told(norms), told(kl), ref_logprobs)
    return stats, (total, ref_total, kl)


@dataclass(frozen=True, kw_only=True)
class _Slopes:
    """Derivatives in the products W·h, from what forward kept ([n] each): log Σ e^l, log Σ e^r and KL(p‖q), and from
    the gradients of log p(y) and of KL; None = there is none."""

    head: Head
    states: Tensor
    targets: Tensor
    plan: Plan
    other: Head | None
    ref_states: Tensor | None
    total: Tensor
    ref_total: Tensor | None
    kl: Tensor | None
    of_logprobs: Tensor | None
    of_kl: Tensor | None

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[rows, columns]."""
        temperature, softcap = self.plan.request.temperature, self.head.softcap
        logits = self.head.tile(self.states[rows], columns, temperature, self.plan.dtype)
        slope = None if softcap is None else (logits * (temperature / softcap)).square_().neg_().add_(1.0)
        full = logits.sub_(self.total[rows, None].to(logits.dtype))
        charge = self._charge(full, rows, columns)
        tile = self._pulled(full.exp_(), charge, rows, columns)
        if slope is not None:
            tile.mul_(slope)
        return tile if temperature == 1.0 else tile.div_(temperature)

    def _charge(self, full: Tensor, rows: slice, columns: slice) -> Tensor | float:
        """κ·(log p − log q − KL), with ``full`` = log p."""
        if self.of_kl is None or self.other is None:
            return 0.0
        assert self.ref_states is not None and self.ref_total is not None and self.kl is not None
        reference = self.other.tile(self.ref_states[rows], columns, self.plan.request.temperature, self.plan.dtype)
        centre = (self.ref_total - self.kl)[rows, None].to(full.dtype)
        return reference.sub_(centre).neg_().add_(full).mul_(self.of_kl[rows, None])

    def _pulled(self, probabilities: Tensor, charge: Tensor | float, rows: slice, columns: slice) -> Tensor:
        """p·(charge − g), and g more at the target."""
        if self.of_logprobs is None:
            return probabilities * charge
        own = self.of_logprobs[rows, None].to(probabilities.dtype)
        tile = probabilities.mul_(charge - own)
        at = (self.targets[rows] - columns.start)[:, None]
        inside = (at >= 0) & (at < tile.shape[1])
        return tile.scatter_add_(1, at.clamp(0, tile.shape[1] - 1), own * inside)


@dataclass
class _Into:
    """Where gradients are summed; None = not wanted. fused: weight is ``weight.grad`` itself, nothing is returned."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    fused: bool

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...], parameter: Tensor | None
    ) -> _Into:
        """parameter: whose ``grad`` is added to; None = the weight's gradient is returned."""
        wide, own = torch.promote_types(hidden.dtype, torch.float32), None
        if wanted[1] and parameter is not None:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = parameter.grad
        elif wanted[1]:
            own = torch.zeros_like(weight)
        return cls(
            hidden=hidden.new_zeros(hidden.shape, dtype=wide) if wanted[0] else None,
            weight=own,
            bias=torch.zeros_like(bias) if bias is not None and wanted[2] else None,
            fused=parameter is not None,
        )

    def add(self, tile: Tensor, states: Tensor, weight: Tensor, rows: slice, columns: slice) -> None:
        if self.hidden is not None:
            _add_product(self.hidden[rows], tile, weight)
        if self.weight is not None:
            _add_product(self.weight[columns], tile.t(), states)
        if self.bias is not None:
            self.bias[columns] += tile.sum(0)

    def hidden_like(self, hidden: Tensor) -> Tensor | None:
        return None if self.hidden is None else self.hidden.to(hidden.dtype)

    @property
    def returned_weight(self) -> Tensor | None:
        return None if self.fused else self.weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
