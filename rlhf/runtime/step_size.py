"""Steps of the right size: measured by how far they move the policy's distributions, not its weights.

KL(π_new‖π_old) is computed over the full vocabulary at every position of the batch that the step was taken on, summed
over a completion and averaged over completions: nats a completion. A sampled estimate would be noise at this size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import Need, Objective, StatsRequest, TokenStats, Unit
from rlhf.maths.conjugate_gradient import conjugate_gradient
from rlhf.maths.kl import exact_local_loss_sum
from rlhf.models.layout import Layout, plain_rows
from rlhf.models.load import frozen_copy
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.rollout import TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import Applied, PolicyForward, Term, Updater

# Relative to the weights' norm: far enough that rounding does not show in a difference of two gradients, near enough
# that their third-order difference does not either.
# (Transformers' RMSNorm computes in fp32 whatever the weights are, so float64 gains little from a shorter one.)
_PROBE = {torch.float32: 3e-4, torch.float64: 1e-4}
_SLACK = 1.05  # a limit kept to 5 % is kept
VECTORS = 9  # copies of the trained weights beside the weights and their gradient that TrustRegion holds at its peak


@dataclass(frozen=True)
class Before:
    """The policy as it was before a step.

    wrapped: the policy as accelerate returned it. policy: the ``ScoredModel`` inside. old: its frozen copy.
    """

    runtime: Runtime
    wrapped: nn.Module
    policy: ScoredModel
    old: FrozenReference
    microbatch_tokens: int
    layout: Layout = plain_rows

    @classmethod
    def of(
        cls,
        runtime: Runtime,
        wrapped: nn.Module,
        policy: ScoredModel,
        microbatch_tokens: int,
        layout: Layout = plain_rows,
    ) -> Before:
        """Weights that are not trained are shared with the copy.

        Raises UserError where weights are in shards: the copies that forwards read are remade from them.
        """
        refuse_shards(runtime)
        copy = ScoredModel(frozen_copy(policy.causal_lm), compute_dtype=policy.compute_dtype)
        return cls(runtime, wrapped, policy, FrozenReference(copy.to(runtime.device)), microbatch_tokens, layout)

    def weights(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(now, before) of everything in the policy that is trained."""
        old = dict(self.old.model.causal_lm.named_parameters())
        return [(p, old[name]) for name, p in self.policy.causal_lm.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def remember(self) -> None:
        for now, before in self.weights():
            before.copy_(now)

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Keeps this share of the step: w ← w_before + share·(w − w_before)."""
        for now, before in self.weights():
            now.copy_(torch.lerp(before, now, share))

    @torch.no_grad()
    def place(self, step: Tensor, share: float = 1.0) -> None:
        """w ← w_before + share·step, a vector over all of ``weights``."""
        parts = torch.split(step, [now.numel() for now, _ in self.weights()])
        for (now, before), part in zip(self.weights(), parts, strict=True):
            torch.add(before, part.view_as(before), alpha=share, out=now)

    @torch.no_grad()
    def undo(self) -> None:
        """w ← w_before, whatever has become of w."""
        for now, before in self.weights():
            now.copy_(before)

    def kl(self, batch: TokenBatch, temperature: float) -> float:
        """Nats a completion, over all processes."""
        request = StatsRequest(temperature=temperature, reference=True)

        def forward(part: TokenBatch) -> TokenStats:
            rows = self.layout(part)
            return token_stats(self.wrapped, rows, request, self.old.states(rows))

        found = microbatches.score(batch, forward, self.microbatch_tokens, self.runtime, self.layout.cells).kl
        assert found is not None
        total = exact_local_loss_sum(found.double(), batch.completion_mask, batch.valid)
        sums = torch.stack([total, batch.valid.sum().double()])
        nats, count = self.runtime.sum(sums).tolist()
        return max(float(nats), 0.0) / max(float(count), 1.0)


def refuse_shards(runtime: Runtime) -> None:
    """Raises UserError where weights are sharded or offloaded."""
    if runtime.deepspeed or runtime.sharded:
        raise UserError(
            f"optim.kl_step_limit and trpo put whole weights back after a step, and {runtime.kind} holds them in "
            "shards: launch without sharding (accelerate_configs/cpu_2ranks.yaml, single_gpu.yaml), or leave them out"
        )


def refuse_lack_of_memory(policy: nn.Module, runtime: Runtime) -> None:
    """Raises UserError where the vectors of TrustRegion would not fit beside what is loaded."""
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    free = -int(runtime.max(torch.tensor(-_free_bytes(runtime), device=runtime.device)))  # the least, on every rank
    if VECTORS * trained > free:
        raise UserError(
            f"trpo holds {VECTORS} copies of the trained weights: {VECTORS * trained / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; train an adapter (policy.lora), or reinforce with optim.kl_step_limit"
        )


def _free_bytes(runtime: Runtime) -> int:
    """For this process: the processes of a machine share its memory."""
    if runtime.device.type == "cuda":
        return int(torch.cuda.mem_get_info(runtime.device)[0])
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@dataclass(frozen=True)
class KlLimit:
    """Shortens an optimizer's step by √(limit/KL) while it moves the policy by more than ``limit`` nats a completion.

    Near π_old the KL is quadratic in the step, so once is enough for a step that is a little too long; one that is far
    too long is measured and shortened up to four times. A step after which the KL is no number is undone. The
    optimizer's moments are left as they are.
    """

    before: Before
    limit: float

    def remember(self) -> None:
        self.before.remember()

    def shorten(self, batch: TokenBatch, temperature: float) -> Mapping[str, float]:
        share, found = 1.0, self.before.kl(batch, temperature)
        for _ in range(4):
            if found <= self.limit * _SLACK:
                break
            if not math.isfinite(found):
                self.before.undo()
                return {"optim/step_kl": 0.0, "optim/step_share": 0.0}
            cut = (self.limit / found) ** 0.5
            self.before.keep(cut)
            share, found = share * cut, self.before.kl(batch, temperature)
        return {"optim/step_kl": found, "optim/step_share": share}


@dataclass(frozen=True, kw_only=True)
class StepKl:
    """KL(π‖π_old) of a batch as an objective, for its curvature: the Fisher matrix at π_old."""

    temperature: float
    name: str = "step_kl"
    needs: frozenset[Need] = frozenset()
    unit: Unit = "completion"

    @property
    def request(self) -> StatsRequest:
        return StatsRequest(temperature=self.temperature, reference=True)

    def count(self, batch: TokenBatch) -> Tensor:
        return batch.valid.sum()

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        assert stats.kl is not None
        return {"kl": exact_local_loss_sum(stats.kl, batch.completion_mask, batch.valid)}


@dataclass(frozen=True)
class TrustRegion(Updater):
    """TRPO (Schulman et al. 2015): along (F + damping·I)⁻¹g, as far as KL(π_new‖π_old) ≤ max_kl on the rollout.

    F is the Fisher matrix of the rollout's positions. Its products come from central differences of the gradient of
    the exact KL, so any attention kernel and the chunked head will do: F·v = (∇KL(w + εv) − ∇KL(w − εv)) / 2ε. The
    line search asks for the KL alone, not for a better surrogate. The learning rate is not read; ``optim/step_share``
    is the share of the quadratic model's step that was kept.
    """

    before: Before | None = None
    max_kl: float = 0.1
    damping: float = 0.1
    iterations: int = 10
    backtracks: int = 10

    def _apply(self, terms: Sequence[Term]) -> Applied:
        assert self.before is not None
        weights = [now for now, _ in self.before.weights()]
        gradient = _taken(weights)
        norm = float(gradient.norm())
        if not 0 < norm < float("inf"):
            return Applied(norm, norm == 0)
        self.before.remember()
        direction = self.natural_direction(gradient, terms[0])
        if not float(direction @ gradient) > 0:  # rounding had the word in every product
            direction = gradient / self.damping
        direction *= -((2 * self.max_kl / float(direction @ gradient)) ** 0.5)
        return self._line_search(direction, terms[0], norm)

    def natural_direction(self, gradient: Tensor, term: Term) -> Tensor:
        """(F + damping·I)⁻¹·gradient by conjugate gradient; leaves the weights at ``before``."""
        assert self.before is not None
        norm = float(torch.stack([old.norm() for _, old in self.before.weights()]).norm())

        def product(vector: Tensor) -> Tensor:
            step = _PROBE[vector.dtype] * norm / float(vector.norm())
            difference = self._kl_gradient(vector, step, term)
            difference -= self._kl_gradient(vector, -step, term)
            return difference.div_(2 * step).add_(vector, alpha=self.damping)

        found = conjugate_gradient(product, gradient, self.iterations)
        self.before.undo()
        return found

    def _kl_gradient(self, vector: Tensor, step: float, term: Term) -> Tensor:
        """∇KL(π‖π_old) at w_before + step·vector."""
        assert self.before is not None
        self.before.place(vector, step)
        objective: Objective = StepKl(temperature=term.objective.request.temperature)
        forward = PolicyForward(self.before.old, self.before.layout)
        self.accumulate([Term(objective=objective, batch=term.batch)], forward)
        return _taken([now for now, _ in self.before.weights()])

    def _line_search(self, step: Tensor, term: Term, norm: float) -> Applied:
        """Halves the step until it fits; where none does the weights stay as they were (share 0)."""
        assert self.before is not None
        for halvings in range(self.backtracks + 1):
            share = 0.5**halvings
            self.before.place(step, share)
            found = self.before.kl(term.batch, term.objective.request.temperature)
            if found <= self.max_kl:
                return Applied(norm, True, {"optim/step_kl": found, "optim/step_share": share})
        self.before.undo()
        return Applied(norm, True, {"optim/step_kl": 0.0, "optim/step_share": 0.0})


def _taken(weights: Sequence[nn.Parameter]) -> Tensor:
    """The gradient as one vector; it is cleared."""
    found = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    vector = torch.cat([part.flatten() for part in found])
    for weight in weights:
        weight.grad = None
    return vector
