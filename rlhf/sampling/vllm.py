"""vLLM in the process that trains. It starts from the configuration alone: weights are only ever pushed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.sampling.completions import Completion, Each, Ends, nobody
from rlhf.sampling.engine import Pending, Request
from rlhf.sampling.vllm_worker import repack_heads


@dataclass(frozen=True, kw_only=True)
class Start:
    """How vLLM is started, whoever starts it.

    tokens: longest row, prompt and completion. memory_fraction: of the GPU that vLLM may fill. kv_bytes: its keys and
    values on a CPU.
    """

    tokens: int
    dtype: torch.dtype
    memory_fraction: float = 0.4
    kv_bytes: int = 4 * 2**30

    def environment(self) -> dict[str, str]:
        """Variables that it reads."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, self.kv_bytes // 2**30)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # whoever trains computes with the same threads
            "VLLM_NO_USAGE_STATS": "1",
        }

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.LLM``; as options, of ``vllm serve``."""
        on_gpu = torch.cuda.is_available()
        known = {
            "load_format": "dummy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": self.tokens,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",  # after the temperature, as the policy is trained
            "enable_prefix_caching": True,  # a prompt is read once for all its completions
            "seed": 0,
        }
        if on_gpu:
            return {**known, "gpu_memory_utilization": self.memory_fraction}
        # on a CPU a prompt cut in two fails: its generator cannot be set back ("does not use offset")
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self.tokens)}
        return {**known, **whole, "enforce_eager": True}


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """An Engine that starts at its first push.

    tokenizer: of a policy whose completions may end in a string, which vLLM looks for in text. sleeps: between rollouts
    it gives its memory back (a GPU's; weights need not be kept, the next push brings them all).
    """

    start: Start
    tokenizer: Any | None = None
    sleeps: bool = False
    configuration: list[Any] = field(default_factory=list)

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        if not self.configuration:
            self.configuration.append(config)
        if self.sleeps:
            self._llm.wake_up()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._llm.collective_rpc(repack_heads)
        self._llm.reset_prefix_cache()  # else prompts seen before would be read with the old weights

    def begin(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends, each: Each = nobody) -> Pending:
        found = self._decode(requests, max_new_tokens, ends) if requests else []
        return lambda: found

    def _decode(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends) -> list[Completion]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [_parameters(request, max_new_tokens, ends) for request in requests],
            use_tqdm=False,
        )
        if self.sleeps:
            self._llm.sleep(level=2)
        return [_completion(output.outputs[0]) for output in outputs]

    @cached_property
    def _llm(self) -> Any:
        # weights are handed over as tensors, which needs one process
        here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        for name, value in {**self.start.environment(), **here}.items():
            os.environ.setdefault(name, value)
        with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:  # vLLM seeds torch's
            return self._start(folder)

    def _start(self, folder: str) -> Any:
        from vllm import LLM

        self.configuration[0].save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        threads = torch.get_num_threads()
        llm = LLM(
            model=folder,
            skip_tokenizer_init=self.tokenizer is None,
            disable_log_stats=True,
            enable_sleep_mode=self.sleeps,
            **self.start.arguments(),
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


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, torch.tensor(logprobs, dtype=torch.float32), output.finish_reason == "stop")
