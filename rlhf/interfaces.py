"""The seams of the policy loop: Protocols of one to three methods, and the small records that cross them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from rlhf.rollout import Group, Prompt, Rollout, TokenBatch

Need = Literal[
    "scores", "reference", "reference_distribution", "old_logprobs", "score_norms", "greedy", "values", "pairs"
]
Unit = Literal["completion", "group", "pair"]


class Collective(Protocol):
    """What a computation over the global batch needs from the process group."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Tensor) -> Tensor:
        """[n, …] on each rank → [n · world_size, …] in rank order, the same on every rank."""

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over ranks."""

    def max(self, value: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""


@dataclass(frozen=True)
class Alone:
    """The Collective of a single process."""

    rank: int = 0
    world_size: int = 1

    def gather(self, value: Tensor) -> Tensor:
        return value

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, kw_only=True)
class StatsRequest:
    """Which token statistics a forward must return, and at which sampling temperature."""

    temperature: float = 1.0
    entropy: bool = False
    score_norms: bool = False
    values: bool = False  # of the critic
    reference: bool = False  # exact KL and ref_logprobs against reference hidden states handed to the forward


class TokenStats(NamedTuple):
    """Statistics of the completion tokens, [B, C] each, exactly 0 where the mask is False; None = not asked for.

    ``logprobs``, ``kl``, ``values`` and (if its loss is used) ``entropy`` carry gradient; the others are detached.
    """

    logprobs: Tensor  # log π_T(y_t | x, y_<t), nats
    entropy: Tensor | None = None  # −Σ_v π log π, nats
    score_norms: Tensor | None = None  # 1 − 2π(y_t) + Σ_v π(v)²
    kl: Tensor | None = None  # Σ_v π log(π/π_ref) at this position, nats
    ref_logprobs: Tensor | None = None
    scores: Tensor | None = None  # [B] scalar head, reward models only
    values: Tensor | None = None  # V(x, y_<t), with gradient


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that must survive a restart besides tensors of weights, optimizer and RNG. JSON-serialisable.

    step: rollouts (or supervised optimizer steps) finished. optimizer_step: updates applied. moving_average: baseline
    of that name, None before its first use. beta: the KL coefficient of the next step where it adapts.
    """

    step: int = 0
    optimizer_step: int = 0
    completions_seen: int = 0
    tokens_seen: int = 0
    moving_average: float | None = None
    beta: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # an outside objective's own numbers

    def after(self, step: int, *, updates: int, rows: int, tokens: int) -> Self:
        """The state once step ``step`` is done, with that many optimizer steps, rows and completion tokens more."""
        return replace(
            self,
            step=step,
            optimizer_step=self.optimizer_step + updates,
            completions_seen=self.completions_seen + rows,
            tokens_seen=self.tokens_seen + tokens,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


Ended = Callable[[Group, int], None]  # told of a prompt's completions, and their step, once the last of them has ended


class Sampler(Protocol):
    """Draws completions from the policy. One that can tell of a prompt before all others are done has a field
    ``ended: Ended | None``, and tells of every prompt of ``sample`` once."""

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """k completions of each prompt, y ~ π_T(·|x). ``slots``: each prompt's position in the global step."""

    def greedy(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """One arg-max completion of each prompt."""


class Reward(Protocol):
    """One source of scores."""

    @property
    def name(self) -> str:
        """What its scores are called."""

    def score(self, rollout: Rollout, step: int) -> Tensor:
        """[B] float, NaN where the row cannot be scored; never 0 in place of a failure."""


class Asked(Protocol):
    """Scores on their way."""

    @property
    def spans(self) -> Sequence[tuple[float, float]]:
        """When somebody was at work on them, in seconds of ``time.monotonic``; all of it once the scores are there."""


@runtime_checkable
class Remote(Reward, Protocol):
    """A source that scores elsewhere, while this process does something else."""

    def ask(self, group: Group, step: int) -> Any:
        """Asks for the scores of one prompt's completions (an ``Asked``). From any thread; neither waits nor fails."""

    def begin(self, rollout: Rollout, step: int, asked: Sequence[Any] | None = None) -> Callable[[], Tensor]:
        """Asks for the scores, or takes what was asked for each of the rollout's prompts, in their order; the call of
        what it returns waits for them."""


class Objective(Protocol):
    """What is optimised: which quantities it needs, how advantages are made, and the loss as a sum."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def unit(self) -> Unit: ...

    @property
    def request(self) -> StatsRequest: ...

    def count(self, batch: TokenBatch) -> Tensor:
        """Scalar: how many things the loss averages over in this batch (completions, tokens or pairs)."""

    def loss_sum(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        """Summed losses by name; their total over the global ``count`` is what is minimised."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How an objective uses a rollout: ``epochs`` times, each in ``minibatches`` optimizer steps of whole units.

    stop_kl: no further epoch once KL(π_old‖π) exceeds it, nats a completion.
    """

    epochs: int = 1
    minibatches: int = 1
    stop_kl: float | None = None

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches


class PolicyObjective(Objective, Protocol):
    """An objective of the policy loop.

    One that takes several optimizer steps a rollout has ``passes: Passes`` too; one with something to tell of each step
    has ``diagnostics(stats, batch)`` → {metric: (sum, count)} on its process.
    """

    def prepare(self, rollout: Rollout, state: TrainState, collective: Collective) -> tuple[Rollout, TrainState]:
        """Fills in baseline and advantages from the global batch; returns the state they leave behind."""
