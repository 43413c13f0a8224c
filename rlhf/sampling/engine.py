"""Completions of vLLM, which decodes with a copy of the policy: pushed before every rollout, and checked after it.

vLLM draws its own random numbers (one seed a row, so what is decoded beside it has no influence), rounds in its own way
and is told the recipe's sampling alone: nothing of the checkpoint's generation config acts.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models.chat import render_prompt
from rlhf.models.layout import plain_rows
from rlhf.models.load import base_model, merged_state
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.rollout import Prompt, Rollout
from rlhf.sampling import completions
from rlhf.sampling.completions import Completion, Ends
from rlhf.sampling.noise import row_keys

PROBES = 4  # completions of each rollout whose log-probabilities are compared
LARGEST_GAP = 0.1  # nats a token, on average: bfloat16 rounds to about .02, a model that did not arrive is off by .5


class Request(NamedTuple):
    """One row to decode. seed: of its own random numbers. temperature: 0 = arg-max."""

    prompt_ids: Sequence[int]
    temperature: float
    seed: int | None = None


class Engine(Protocol):
    """Decodes with weights that it was given."""

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights, under the names of transformers, and forgets what it computed with the old ones."""

    def decode(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends) -> list[Completion]:
        """One completion each, in their order."""


@dataclass(frozen=True, kw_only=True)
class VLLMSampler:
    """A Sampler that hands decoding to an ``Engine``. gather: entered while weights are read (whole under ZeRO-3).

    Each rollout is checked: of some completions the policy's own log-probabilities are computed, and a mean gap above
    ``LARGEST_GAP`` raises UserError. Before the first one, other weights are pushed and then the right ones, so that an
    engine that takes the first push alone is found out too.
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
    proven: list[bool] = field(default_factory=list)

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """k completions of each prompt, y ~ π_T(·|x): rows prompt by prompt, samples 0 … k-1 within each.

        Returns a Rollout on the model's device with ``rollout_logprobs`` as vLLM computed them, at the temperature.
        """
        found = self._rollout(model, prompts, slots, self.samples_per_prompt, step)
        if len(found):
            self._check(model, found)
        return found

    def greedy(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """The arg-max completion of each prompt. Its ``rollout_logprobs`` are at temperature 1."""
        return self._rollout(model, prompts, slots, 1, None)

    def _rollout(
        self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], count: int, step: int | None
    ) -> Rollout:
        self._push(model)
        ids = [render_prompt(self.tokenizer, prompt) for prompt in prompts]
        rows = [row for row in ids for _ in range(count)]
        if step is None:
            requests = [Request(row, 0.0) for row in rows]
        else:
            seeds = self._seeds(step, slots, count)
            requests = [Request(row, self.temperature, seed) for row, seed in zip(rows, seeds, strict=True)]
        ends = Ends(self.tokenizer, self.stop_ids, self.stop)
        found = self.engine.decode(requests, self.max_new_tokens, ends)
        return completions.rollout(prompts, ids, slots, found, ends).to(next(model.parameters()).device)

    def _seeds(self, step: int, slots: Sequence[int], count: int) -> list[int]:
        """A function of run, step, the prompt's slot and the sample, as everywhere here."""
        group = torch.tensor(slots, dtype=torch.long).repeat_interleave(count)
        sample = torch.arange(count).repeat(len(slots))
        return (row_keys(self.seed, step, group, sample) & (2**63 - 1)).tolist()

    def _push(self, model: nn.Module) -> None:
        base: Any = base_model(model)
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        with torch.no_grad(), self.gather(model):
            if not self.proven:
                # upside down: with the sign changed, many models compute what they did before
                self.engine.push(config, ((name, value.flip(0)) for name, value in merged_state(model).items()))
                self.proven.append(True)
            self.engine.push(config, merged_state(model).items())

    def _check(self, model: nn.Module, found: Rollout) -> None:
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


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """vLLM in this process. Starts at the first push, from the configuration: its weights are only ever pushed.

    tokens: longest row, prompt and completion. memory_fraction: of the GPU that vLLM may fill. kv_bytes: its keys and
    values on a CPU. tokenizer: of a policy whose completions may end in a string, which vLLM looks for in text.
    """

    tokens: int
    dtype: torch.dtype
    tokenizer: Any | None = None
    memory_fraction: float = 0.4
    kv_bytes: int = 4 * 2**30
    configuration: list[Any] = field(default_factory=list)

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        if not self.configuration:
            self.configuration.append(config)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.collective_rpc(_repack_heads)
        self._llm.reset_prefix_cache()  # else prompts seen before would be read with the old weights

    def decode(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends) -> list[Completion]:
        if not requests:
            return []
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [_parameters(request, max_new_tokens, ends) for request in requests],
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]

    @cached_property
    def _llm(self) -> Any:
        for name, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over as tensors
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, self.kv_bytes // 2**30)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes with the same threads
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }.items():
            os.environ.setdefault(name, value)
        with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:  # vLLM seeds torch's
            return self._start(folder)

    def _start(self, folder: str) -> Any:
        from vllm import LLM

        self.configuration[0].save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        threads, on_gpu = torch.get_num_threads(), torch.cuda.is_available()
        llm = LLM(
            model=folder,
            skip_tokenizer_init=self.tokenizer is None,
            load_format="dummy",
            dtype=str(self.dtype).removeprefix("torch."),
            max_model_len=self.tokens,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",  # after the temperature, as the policy is trained
            enable_prefix_caching=True,  # a prompt is read once for all its completions
            enforce_eager=not on_gpu,
            # on a CPU a prompt cut in two fails: its generator cannot be set back ("does not use offset")
            enable_chunked_prefill=on_gpu,
            max_num_batched_tokens=None if on_gpu else max(4096, self.tokens),
            gpu_memory_utilization=self.memory_fraction,
            disable_log_stats=True,
            seed=0,
        )
        torch.set_num_threads(threads)
        return llm


def _parameters(request: Request, max_new_tokens: int, ends: Ends) -> Any:
    """The recipe's sampling and nothing else."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=request.temperature,
        top_p=1.0,
        top_k=0,
        seed=request.seed,
        max_tokens=max_new_tokens,
        stop=list(ends.strings) or None,
        stop_token_ids=list(ends.ids),
        ignore_eos=True,  # the stop ids are ours to name
        logprobs=0,  # of the sampled token
        detokenize=bool(ends.strings),
    )


def _repack_heads(worker: Any) -> None:
    """On a CPU the output head keeps a packed copy of its weights that ``reload_weights`` forgets: outputs stay those
    of the old head, without an error."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, torch.tensor(logprobs, dtype=torch.float32), output.finish_reason == "stop")
