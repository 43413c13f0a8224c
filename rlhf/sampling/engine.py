"""Completions of an engine that holds a copy of the policy: pushed before every rollout, and checked after it.

An engine draws its own random numbers (one seed a row, so what is decoded beside it has no influence), rounds in its
own way and is told the recipe's sampling alone: nothing of the checkpoint's generation config acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf.errors import ExitCode, UserError
from rlhf.interfaces import Ended, StatsRequest
from rlhf.models.chat import render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.load import base_model, configuration, merged_weights
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.rollout import Prompt, Rollout
from rlhf.sampling import completions
from rlhf.sampling.completions import Completion, Each, Ends, Groups, nobody
from rlhf.sampling.noise import row_keys

PROBES = 4  # completions of each rollout whose log-probabilities are compared
PROBE_TOKENS = 8  # of each, where they are decoded for nothing else
LARGEST_GAP = 0.1  # nats a token, on average: bfloat16 rounds to about .02, a model that did not arrive is off by .5


class Request(NamedTuple):
    """One row to decode. seed: of its own random numbers. temperature: 0 = arg-max."""

    prompt_ids: Sequence[int]
    temperature: float
    seed: int | None = None


Pending = Callable[[], list[Completion]]


class Engine(Protocol):
    """Decodes with weights that it was given."""

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights, under the names of transformers, and forgets what it computed with the old ones. What
        was begun is finished first."""

    def begin(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends, each: Each = nobody) -> Pending:
        """Starts one completion of each, or decodes them; the call of what it returns has them, in their order.

        each: told of rows as they end, from any thread; an engine may tell of some or none of them.
        """


@dataclass(frozen=True, kw_only=True)
class EngineSampler:
    """A Sampler that hands decoding to an ``Engine``. gather: entered while weights are read (whole under ZeRO-3).

    Each rollout is checked: of some completions the policy's own log-probabilities are computed, and a mean gap above
    ``LARGEST_GAP`` raises UserError. Before the first one, other weights are pushed and then the right ones, so that an
    engine that takes the first push alone is found out too. ended: told of each prompt of a sampled rollout.
    """

    engine: Engine
    tokenizer: Any
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    ended: Ended | None = None
    proven: list[bool] = field(default_factory=list)

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """k completions of each prompt, y ~ π_T(·|x): rows prompt by prompt, samples 0 … k-1 within each.

        Returns a Rollout on the model's device with ``rollout_logprobs`` as the engine computed them, at the
        temperature.
        """
        self._push(model)
        found = self._whole(model, prompts, slots, step)()
        self._check(model, found)
        return found

    def begin(
        self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int
    ) -> Callable[[], Rollout]:
        """The same with the weights of now; the call of what it returns waits for the completions.

        The policy will have moved on when they are there, so a few tokens are decoded and checked now.
        """
        self._push(model)
        few = slice(0, PROBES)
        rows = self._sampled(prompts[few], slots[few], step, count=1)
        self._check(model, self._begin(model, prompts[few], slots[few], rows, min(PROBE_TOKENS, self.max_new_tokens))())
        return self._whole(model, prompts, slots, step)

    def greedy(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """The arg-max completion of each prompt. Its ``rollout_logprobs`` are at temperature 1."""
        self._push(model)
        rows = [Request(ids, 0.0) for ids in self._ids(prompts)]
        return self._begin(model, prompts, slots, rows, self.max_new_tokens)()

    def _whole(
        self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int
    ) -> Callable[[], Rollout]:
        """Starts the whole rollout, of which ``ended`` is told prompt by prompt."""
        rows, count, ends = self._sampled(prompts, slots, step), self.samples_per_prompt, self._ends()
        if self.ended is None:
            return self._begin(model, prompts, slots, rows, self.max_new_tokens)
        groups = Groups(
            prompts=prompts,
            prompt_ids=self._ids(prompts),
            slots=slots,
            count=count,
            ends=ends,
            tell=self.ended,
            step=step,
        )
        return self._begin(model, prompts, slots, rows, self.max_new_tokens, groups)

    def _begin(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        slots: Sequence[int],
        requests: Sequence[Request],
        max_new_tokens: int,
        groups: Groups | None = None,
    ) -> Callable[[], Rollout]:
        """Starts what becomes a Rollout once it is asked for."""
        ends, device = self._ends(), next(model.parameters()).device
        pending = self.engine.begin(requests, max_new_tokens, ends, nobody if groups is None else groups.add)

        def finish() -> Rollout:
            found = pending()
            if groups is not None:
                groups.rest(found)
            return completions.rollout(prompts, self._ids(prompts), slots, found, ends).to(device)

        return finish

    def _ends(self) -> Ends:
        return Ends(self.tokenizer, self.stop_ids, self.stop)

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [render_prompt(self.tokenizer, prompt) for prompt in prompts]

    def _sampled(
        self, prompts: Sequence[Prompt], slots: Sequence[int], step: int, count: int | None = None
    ) -> list[Request]:
        """k rows of each prompt, seeded by run, step, the prompt's slot and the sample, as everywhere here."""
        count = count or self.samples_per_prompt
        group = torch.tensor(slots, dtype=torch.long).repeat_interleave(count)
        sample = torch.arange(count).repeat(len(slots))
        seeds = (row_keys(self.seed, step, group, sample) & (2**63 - 1)).tolist()
        rows = [ids for ids in self._ids(prompts) for _ in range(count)]
        return [Request(row, self.temperature, seed) for row, seed in zip(rows, seeds, strict=True)]

    def _push(self, model: nn.Module) -> None:
        config = configuration(model)
        with torch.no_grad(), self.gather(model):
            if not self.proven:
                # upside down: with the sign changed, many models compute what they did before
                self.engine.push(config, ((name, value.flip(0)) for name, value in merged_weights(model)))
                self.proven.append(True)
            self.engine.push(config, merged_weights(model))

    def _check(self, model: nn.Module, found: Rollout) -> None:
        if not len(found):
            return
        rows = found.select(list(range(0, len(found), max(1, len(found) // PROBES)))[:PROBES])
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        with torch.no_grad(), self.gather(model):
            fused = getattr(base_model(model).lm_head, "fused", False)
            scored = ScoredModel(model, compute_dtype=self.compute_dtype, fused=fused)
            own = token_stats(scored, plain_rows(rows), StatsRequest(temperature=self.temperature)).logprobs
        for module, training in modes:
            module.training = training
        assert rows.rollout_logprobs is not None
        gap = float((own - rows.rollout_logprobs).abs()[rows.completion_mask].mean())
        if not gap <= LARGEST_GAP:
            raise UserError(
                f"rollout.engine=vllm: its log-probabilities differ from the policy's by {gap:.2f} nats a token on "
                f"average, and rounding makes at most {LARGEST_GAP}: the weights did not arrive, or this version of "
                "vLLM computes the model differently; set rollout.engine=hf"
            )


class Ranks(Protocol):
    """What ``Shared`` needs to know of the processes that train together."""

    @property
    def rank(self) -> int: ...

    def gather_objects(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Shared:
    """One engine for all processes: the first pushes and asks for everybody's rows, each gets its own.

    The first is told of its rows as they end, the others once all have. What the engine refuses (UserError) ends all of
    them, with the same words.
    """

    engine: Engine
    ranks: Ranks

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._of_first(lambda: self.engine.push(config, weights))

    def begin(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends, each: Each = nobody) -> Pending:
        def own(row: int, ids: list[int], finished: bool) -> None:
            if row < len(requests):  # those of the first process come first
                each(row, ids, finished)

        asked = self.ranks.gather_objects([tuple(request) for request in requests])
        rows = [Request(*row) for part in asked for row in part]
        before = sum(len(part) for part in asked[: self.ranks.rank])
        pending = self._of_first(lambda: self.engine.begin(rows, max_new_tokens, ends, own), share=False)

        def finish() -> list[Completion]:
            found: list[Completion] = self._of_first(pending)
            return found[before : before + len(requests)]

        return finish

    def _of_first(self, act: Callable[[], Any], share: bool = True) -> Any:
        """What the first process's ``act`` returned, on every process; raised on every process where it failed."""
        result, refusal = None, None
        if self.ranks.rank == 0:
            try:
                result = act()
            except UserError as error:
                refusal = (str(error), int(error.code))
        told, refusal = self.ranks.gather_objects((result if share else None, refusal))[0]
        if refusal is not None:
            raise UserError(refusal[0], ExitCode(refusal[1]))
        return told if share else result
