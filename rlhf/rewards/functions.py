"""Reward functions: plain Python with TRL's signature, and a strict reading of what they return.

A function is called once per rollout with keyword arguments: ``prompts`` and ``completions`` (message lists for
conversational rows, strings for plain text), ``completion_ids`` (lists of ids, stop token included), ``trainer_state``
(``.global_step``, ``.max_steps``), ``log_extra(column, values)``, ``log_metric(name, value)``, and every column of the
data rows as a list. It returns one number per row, or None for a row it cannot score. It may be ``async``.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.rollout import Rollout

RewardFunction = Callable[..., Any]
_RESERVED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})


@dataclass(frozen=True)
class TrainerState:
    """What a function may know about the run. max_steps 0 = not known."""

    global_step: int
    max_steps: int


@dataclass
class FunctionLog:
    """What a function said with ``log_extra`` and ``log_metric`` during its last call."""

    name: str
    rows: int = 0
    extras: dict[str, list[Any]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """A column for the samples file: one value per row. Raises UserError for another number of values."""
        kept = list(values)
        if len(kept) != self.rows:
            raise UserError(
                f"reward function {self.name}: log_extra({column!r}, …) got {len(kept)} values for {self.rows} "
                "completions; give one per completion"
            )
        self.extras[str(column)] = kept

    def metric(self, name: str, value: float) -> None:
        """A number for the metrics file; several calls of one step are averaged. Raises UserError for anything else."""
        number = _number(value)
        if number is None:
            raise UserError(
                f"reward function {self.name}: log_metric({name!r}, …) got {_shown(value)}; give it an int or a float"
            )
        self.values.setdefault(str(name), []).append(number)


@dataclass(frozen=True)
class FunctionReward:
    """A reward function as a source of scores.

    weight: its share in the reward, added as weight · score; 0 = logged, not trained on. max_steps: the run's length,
    shown to the function as ``trainer_state.max_steps``.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    max_steps: int = 0
    log: FunctionLog = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", FunctionLog(self.name))

    def score(self, rollout: Rollout, step: int) -> Tensor:
        """[B] float32 on the rollout's device, NaN where the function returned None, NaN or an infinity.

        Raises UserError when the answer is not one number or None per row; an exception of the function itself passes
        through with the function's name as a note.
        """
        self.log.rows, self.log.extras, self.log.values = len(rollout), {}, {}
        arguments = self._accepted(call_arguments(rollout, TrainerState(step, self.max_steps), self.log))
        try:
            returned = self.function(**arguments)
            if inspect.isawaitable(returned):
                returned = _wait_for(returned)
        except Exception as error:
            error.add_note(f"raised by the reward function {self.name} at step {step}")
            raise
        numbers = checked_scores(self.name, returned, len(rollout))
        scores = torch.tensor(numbers, dtype=torch.float64).to(torch.float32)
        return torch.where(scores.isfinite(), scores, torch.nan).to(rollout.group.device)

    def _accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments the function has parameters for (all of them when it takes ``**kwargs``)."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some callables written in C have no signature
            return dict(arguments)
        missing = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in arguments
        ]
        if missing:
            columns = ", ".join(sorted(set(arguments) - _RESERVED)) or "no further columns"
            raise UserError(
                f"reward function {self.name} asks for {', '.join(missing)}, which the rows do not have; they have "
                f"{columns}: rename with data.train.0.columns or give the parameter a default"
            )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return dict(arguments)
        wanted = {p.name for p in parameters}
        return {name: value for name, value in arguments.items() if name in wanted}


def call_arguments(rollout: Rollout, state: TrainerState, log: FunctionLog) -> dict[str, Any]:
    """The keyword arguments of one call, in the forms TRL documents. A row without some column has None there."""
    names = dict.fromkeys(name for prompt in rollout.prompts for name in prompt.columns)
    lengths = rollout.completion_mask.sum(1).tolist()
    columns = {
        name: [prompt.columns.get(name) for prompt in rollout.prompts] for name in names if name not in _RESERVED
    }
    return {
        **columns,
        "prompts": [prompt.messages() if prompt.conversational else prompt.text for prompt in rollout.prompts],
        "completions": [
            [{"role": "assistant", "content": text}] if prompt.conversational else text
            for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)
        ],
        "completion_ids": [ids[:length] for ids, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)],
        "trainer_state": state,
        "log_extra": log.extra,
        "log_metric": log.metric,
    }


def checked_scores(name: str, returned: Any, rows: int) -> list[float]:
    """What a function returned as ``rows`` floats, NaN for None. A failure is never turned into a number.

    Lists, tuples and one-dimensional arrays and tensors of ints and floats are read. Raises UserError naming the
    function and what came back for everything else: another length, bools, strings, nested lists, mappings, iterators.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    advice = f"return a list of {rows} numbers, one per completion (None = this one cannot be scored)"
    if not isinstance(values, list | tuple):
        raise UserError(f"reward function {name} returned {_shown(returned)}; {advice}")
    if len(values) != rows:
        raise UserError(f"reward function {name} returned {len(values)} scores for {rows} completions; {advice}")
    numbers = [math.nan if value is None else _number(value) for value in values]
    for row, number in enumerate(numbers):
        if number is None:
            raise UserError(f"reward function {name} returned {_shown(values[row])} for row {row}; {advice}")
    return [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    """A real number as a float (one too large becomes infinite); None for everything else, bools included."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _wait_for(awaitable: Awaitable[Any]) -> Any:
    async def run() -> Any:
        return await awaitable

    return asyncio.run_coroutine_threadsafe(run(), _event_loop()).result()


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole run, in a thread of its own: clients that a function keeps open stay usable, and a
    notebook's running loop is not in the way."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward-functions", daemon=True).start()
    return loop
