"""One optimizer step: microbatches → backward → one step, the same gradient however the batch was cut.

gradient = Σ_terms coefficient · ∇ Σ_rows loss / (count over all ranks). Losses are sums; the one division is by a
global count, so neither the microbatch split nor the number of processes changes the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf.interfaces import Objective, TokenStats
from rlhf.models.layout import Cost, Layout, plain_rows
from rlhf.models.policy import token_stats
from rlhf.models.reference import Reference
from rlhf.rollout import TokenBatch
from rlhf.runtime import fsdp
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.microbatches import Collected, Microbatch, Microbatches, split


class Forward(Protocol):
    """One forward of the trained model over a microbatch, with gradient."""

    def __call__(self, model: nn.Module, batch: TokenBatch, objective: Objective) -> TokenStats: ...


@dataclass(frozen=True)
class PolicyForward:
    """Token statistics of a ``ScoredModel``; runs the reference beside it where exact KL is asked for."""

    reference: Reference | None = None
    layout: Layout = plain_rows

    def __call__(self, model: nn.Module, batch: TokenBatch, objective: Objective) -> TokenStats:
        rows = self.layout(batch)
        states = None
        if objective.request.reference:
            if self.reference is None:
                raise ValueError(f"objective {objective.name} needs the reference's distribution")
            states = self.reference.states(rows)
        return token_stats(model, rows, objective.request, states)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of the step's loss: an objective over a batch, weighted."""

    objective: Objective
    batch: TokenBatch
    coefficient: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What a step did. losses: global means by name. grad_norm: before clipping, over all ranks. stats: the forward's
    detached statistics of every term's batch, in its row order. applied: False where the step was skipped. measured:
    what was measured of the step itself, by metric name."""

    losses: dict[str, float]
    grad_norm: float
    lr: float
    applied: bool
    microbatches: int
    stats: tuple[TokenStats, ...]
    measured: Mapping[str, float] = field(default_factory=dict)


class Applied(NamedTuple):
    """The gradient's norm before clipping; whether the step was taken; what was measured of it."""

    norm: float
    applied: bool
    measured: Mapping[str, float] = {}


class Limit(Protocol):
    """What may shorten an optimizer step that has gone too far (``runtime.step_size``)."""

    def remember(self) -> None:
        """Called before the step."""

    def shorten(self, batch: TokenBatch, temperature: float) -> Mapping[str, float]:
        """Called after it, with what it was taken on; returns what it measured."""


@dataclass(frozen=True)
class Updater:
    """AdamW (or any torch optimizer) over microbatches, on one process, DDP, DeepSpeed or FSDP2.

    learning_rate: optimizer step (1-based) → lr. A pure function, so a resumed run needs no scheduler state and a
    launcher cannot step it twice. max_grad_norm: global norm; None = no clipping.
    """

    runtime: Runtime
    model: nn.Module
    optimizer: Any
    learning_rate: Callable[[int], float]
    forward: Forward
    microbatch_tokens: int
    max_grad_norm: float | None = 1.0
    cost: Cost = plain_rows.cells
    limit: Limit | None = None

    def step(self, terms: Sequence[Term], optimizer_step: int) -> UpdateReport:
        """Raises nothing on non-finite gradients: the step is skipped on all ranks and reported."""
        lr = self.learning_rate(optimizer_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        losses, stats, done = self.accumulate(terms, self.forward)
        applied = self._apply(terms)
        return UpdateReport(
            losses=losses,
            grad_norm=applied.norm,
            lr=lr,
            applied=applied.applied,
            microbatches=done,
            stats=stats,
            measured=applied.measured,
        )

    def accumulate(
        self, terms: Sequence[Term], forward: Forward
    ) -> tuple[dict[str, float], tuple[TokenStats, ...], int]:
        """The gradient of the terms, added to ``.grad``: (global mean losses by name, statistics by term, forwards)."""
        losses: dict[str, Tensor] = {}
        work = [(term, self._count(term), self._cut(term)) for term in terms]
        collected = [Collected(len(term.batch), term.batch.completion_ids.shape[1]) for term in terms]
        last = sum(len(cuts) for _, _, cuts in work) - 1
        done = 0
        self.model.train()
        for (term, count, cuts), kept in zip(work, collected, strict=True):
            for microbatch in cuts:
                with self._sync(done == last):
                    sums, stats = self._forward_backward(term, microbatch, count, forward)
                done += 1
                _add(losses, sums, count)
                kept.add(microbatch, stats)
        totals = self.runtime.sum(torch.stack(list(losses.values()))).tolist()
        return dict(zip(losses, totals, strict=True)), tuple(kept.stats() for kept in collected), done

    def _cut(self, term: Term) -> Microbatches:
        return split(term.batch, self.microbatch_tokens, self.runtime, self.cost)

    def _count(self, term: Term) -> Tensor:
        count = term.objective.count(term.batch).to(self.runtime.device, torch.float64)
        return self.runtime.sum(count).clamp_min(1.0)

    def _forward_backward(
        self, term: Term, microbatch: Microbatch, count: Tensor, forward: Forward
    ) -> tuple[dict[str, Tensor], TokenStats]:
        stats = forward(self.model, microbatch.batch, term.objective)
        sums = term.objective.loss_sum(stats, microbatch.batch)
        total = torch.stack(list(sums.values())).sum()
        # DDP, ZeRO and FSDP2 average gradients over ranks; the global count asks for their sum.
        scale = 0.0 if microbatch.filler else term.coefficient * self.runtime.world_size / count.item()
        self._backward(total * scale)
        weight = 0.0 if microbatch.filler else term.coefficient
        return {name: value.detach().double() * weight for name, value in sums.items()}, stats

    def _backward(self, loss: Tensor) -> None:
        if self.runtime.deepspeed:
            cast(Any, self.model).backward(loss)  # accelerator.backward would step the engine at every microbatch
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Gradients meet at the last microbatch only; under FSDP2 at each, for only shares of them are kept."""
        if self.runtime.deepspeed:
            cast(Any, self.model).set_gradient_accumulation_boundary(is_boundary=last)
            yield
        elif self.runtime.kind == "ddp" and not last:
            with cast(Any, self.model).no_sync():
                yield
        else:
            yield

    def _apply(self, terms: Sequence[Term]) -> Applied:
        """One step along the accumulated gradient."""
        if self.runtime.deepspeed:
            return self._apply_deepspeed()
        if self.limit is not None:
            self.limit.remember()
        limit = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        trained = self._with_gradient()
        total = fsdp.full_tensor(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in trained]))
        torch.nn.utils.clip_grads_with_norm_(trained, limit, total)
        norm = float(total)
        applied = norm < float("inf")  # False for inf and NaN; the norm is the same on every rank
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.limit is None or not applied:
            return Applied(norm, applied)
        return Applied(norm, True, self.limit.shorten(terms[0].batch, terms[0].objective.request.temperature))

    def _with_gradient(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.grad is not None]

    def _apply_deepspeed(self) -> Applied:
        engine = cast(Any, self.model)
        engine.step()
        norm = float(engine.get_global_grad_norm() or 0.0)
        return Applied(norm, bool(engine.was_step_applied()) and norm < float("inf"))


def _add(losses: dict[str, Tensor], sums: dict[str, Tensor], count: Tensor) -> None:
    for name, value in sums.items():
        losses[name] = losses.get(name, torch.zeros_like(value)) + value / count
