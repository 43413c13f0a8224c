"""Completions of a transformers model: greedy decoding of logits to which the counter-based noise was added.

Models that ``sampling.loop`` knows are decoded there, others through ``transformers.generate``, which only carries the
KV cache. It never draws a random number, and nothing of the checkpoint's own generation config acts: top-k, penalties
or suppressed tokens would make the sampler's policy another one than the policy whose log-probabilities are trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from rlhf.interfaces import Ended
from rlhf.models import masks
from rlhf.models.chat import render_prompt
from rlhf.rollout import Prompt, Rollout, pad_rows
from rlhf.sampling import completions, loop
from rlhf.sampling.completions import Completion, Each, Ends, Groups
from rlhf.sampling.noise import Workspace, position_keys, row_keys, sample_tokens

_RESHAPING = (
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale"),
    *("watermarking_config", "remove_invalid_values", "num_beams", "penalty_alpha", "dola_layers"),
)
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1}


@dataclass(frozen=True, kw_only=True)
class HFSampler:
    """A Sampler for any transformers causal LM (or PeftModel around one). Consumes no global random state.

    stop_ids: every id that ends a completion; it counts as part of the completion.
    stop: strings that end a completion with the token that completes them; ``texts`` are cut before them.
    microbatch_rows: rows that ``generate`` decodes together; rows are sorted by prompt length first.
    plain: ``generate`` whatever the model. kv_bytes: most memory for keys and values in the loop.
    compute_dtype: autocast type of the decode; float32 and float64 run as the weights are.
    gather: entered around decoding; inside it the model must run without collectives (ranks stop at different
    lengths), so under ZeRO-3 it gathers the weights and takes the partitioning hooks off.
    ended: told of each prompt of a sampled rollout.
    """

    tokenizer: Any
    samples_per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    microbatch_rows: int = 256
    plain: bool = False
    kv_bytes: int = 4 * 2**30
    compute_dtype: torch.dtype = torch.float32
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    ended: Ended | None = None

    def sample(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """k completions of each prompt, y ~ π_T(·|x): rows prompt by prompt, samples 0 … k-1 within each.

        ``slots``: each prompt's place in the step's global prompt list; with (seed, step) it fixes the noise, whatever
        else is decoded beside it. Returns a Rollout on the model's device with ``rollout_logprobs`` filled in.
        """
        return self._rollout(model, prompts, slots, self.samples_per_prompt, step)

    def greedy(self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], step: int) -> Rollout:
        """The arg-max completion of each prompt, one row per prompt; ``step`` has no influence."""
        return self._rollout(model, prompts, slots, 1, None)

    def _rollout(
        self, model: nn.Module, prompts: Sequence[Prompt], slots: Sequence[int], count: int, step: int | None
    ) -> Rollout:
        lm = _causal_lm(model)
        device = next(lm.parameters()).device
        distinct = [render_prompt(self.tokenizer, prompt) for prompt in prompts]
        prompt_ids = [ids for ids in distinct for _ in range(count)]
        group = torch.tensor(slots, dtype=torch.long).repeat_interleave(count)
        sample = torch.arange(count).repeat(len(prompts))
        keys = None if step is None else row_keys(self.seed, step, group, sample).to(device)
        ends, each = Ends(self.tokenizer, self.stop_ids, self.stop), None
        if step is not None and self.ended is not None:
            each = Groups(
                prompts=prompts,
                prompt_ids=distinct,
                slots=slots,
                count=count,
                ends=ends,
                tell=self.ended,
                step=step,
            ).add
        _warn_about(lm.generation_config)
        with torch.no_grad(), self.gather(model), _decoding(lm, self._config()), self._autocast(device):
            found = self._decode(lm, prompt_ids, keys, device, each)
        return completions.rollout(prompts, distinct, slots, found, ends).to(device)

    def _decode(
        self,
        lm: Any,
        prompt_ids: Sequence[Sequence[int]],
        keys: Tensor | None,
        device: torch.device,
        each: Each | None,
    ) -> list[Completion]:
        """Completions in the order of ``prompt_ids``. Stop strings are ``generate``'s to find."""
        if self.plain or self.stop or not prompt_ids or not masks.known(lm):
            return self._generate(lm, prompt_ids, keys, device, each)
        distinct = list(dict.fromkeys(map(tuple, prompt_ids)))
        place = {prompt: index for index, prompt in enumerate(distinct)}
        found = loop.DecodeLoop(
            lm,
            self.max_new_tokens,
            torch.tensor(self.stop_ids, dtype=torch.long, device=device),
            _RowChoice(keys, self.temperature),
            self.kv_bytes,
            each=each,
        ).run(distinct, [place[tuple(prompt)] for prompt in prompt_ids])
        columns = (found.ids.tolist(), found.logprobs.cpu(), found.lengths.tolist(), found.finished.tolist())
        return [Completion(ids[:n], values[:n], done) for ids, values, n, done in zip(*columns, strict=True)]

    def _generate(
        self,
        lm: Any,
        prompt_ids: Sequence[Sequence[int]],
        keys: Tensor | None,
        device: torch.device,
        each: Each | None,
    ) -> list[Completion]:
        """Completions in the order of ``prompt_ids``, decoded in microbatches of similar prompt length."""
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        strings = StopStringCriteria(self.tokenizer, list(self.stop)) if self.stop else None
        found: dict[int, Completion] = {}
        for start in range(0, len(order), self.microbatch_rows):
            rows = order[start : start + self.microbatch_rows]
            ids, mask = (part.to(device) for part in pad_rows([prompt_ids[row] for row in rows], side="left"))
            choice = _Choice(None if keys is None else keys[rows], ids.shape[1], self.temperature)
            stops = _Stops(torch.tensor(self.stop_ids, dtype=torch.long, device=device), strings, ids.shape[1])
            sequences = lm.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                generation_config=self._config(),
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList([stops]),
                synced_gpus=False,
            )
            found.update(zip(rows, _completions(sequences[:, ids.shape[1] :], choice, stops), strict=True))
            if each is not None:
                for row in rows:
                    each(row, found[row].ids, found[row].finished)
        return [found[row] for row in range(len(prompt_ids))]

    def _config(self) -> GenerationConfig:
        return _config(max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        low = self.compute_dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(device.type, dtype=self.compute_dtype if low else None, enabled=low)


@dataclass
class _RowChoice:
    """Chooses the next tokens of rows that stand at positions of their own."""

    keys: Tensor | None
    temperature: float
    workspace: Workspace | None = None

    def __call__(self, logits: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys = None if self.keys is None else position_keys(self.keys[rows], positions)
        if self.workspace is None or self.workspace.vocab != logits.shape[1]:
            self.workspace = Workspace.like(logits)
        return sample_tokens(logits, self.temperature, keys, self.workspace)


class _Choice(LogitsProcessor):
    """Chooses each row's next token, records log π_T of it, and makes it the arg-max that ``generate`` will take."""

    def __init__(self, keys: Tensor | None, prompt_width: int, temperature: float) -> None:
        self.keys, self.prompt_width, self.temperature = keys, prompt_width, temperature
        self.logprobs: list[Tensor] = []
        self.workspace: Workspace | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        keys = None if self.keys is None else position_keys(self.keys, position)
        self.workspace = self.workspace or Workspace.like(scores)
        tokens, logprobs = sample_tokens(scores, self.temperature, keys, self.workspace)
        self.logprobs.append(logprobs)
        return scores.scatter_(1, tokens[:, None], torch.inf)


class _Stops(StoppingCriteria):
    """Ends rows at a stop id or stop string and remembers where, so that lengths never come from pad ids.

    Stop strings are looked for in the completion alone: one that began in the prompt does not count.
    """

    def __init__(self, stop_ids: Tensor, strings: StopStringCriteria | None, prompt_width: int) -> None:
        self.stop_ids, self.strings, self.prompt_width = stop_ids, strings, prompt_width
        self.done: Tensor | None = None
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        completion = input_ids[:, self.prompt_width :]
        hit = torch.isin(completion[:, -1], self.stop_ids)
        if self.strings is not None:
            hit |= self.strings(cast(torch.LongTensor, completion), None)
        if self.done is None or self.lengths is None:
            self.done, self.lengths = torch.zeros_like(hit), torch.zeros_like(completion[:, 0])
        self.lengths += ~self.done
        self.done = self.done | hit
        return self.done


def _completions(ids: Tensor, choice: _Choice, stops: _Stops) -> Iterator[Completion]:
    assert stops.done is not None and stops.lengths is not None
    logprobs = torch.stack(choice.logprobs, dim=1).cpu()
    columns = (ids.tolist(), logprobs, stops.lengths.tolist(), stops.done.tolist())
    for row, values, length, finished in zip(*columns, strict=True):
        yield Completion(row[:length], values[:length], finished)


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model, below an adapter if there is one: adapter layers sit inside it and stay active."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _decoding(lm: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and ``config`` in place of the checkpoint's, which ``generate`` would fill gaps from."""
    modes = [(module, module.training) for module in lm.modules()]
    own = lm.generation_config
    lm.eval()
    lm.generation_config = config
    try:
        yield
    finally:
        lm.generation_config = own
        for module, training in modes:
            module.training = training


def _config(**settings: Any) -> GenerationConfig:
    return cast(GenerationConfig, cast(Any, GenerationConfig)(**settings))


def _warn_about(config: GenerationConfig | None) -> None:
    """Says once which settings of the checkpoint would have changed the distribution and are not applied."""
    defaults = _config()
    found = {name: getattr(config, name, None) for name in _RESHAPING}
    acting = [
        f"{name}={value}"
        for name, value in found.items()
        if value is not None and value not in (getattr(defaults, name, None), _NEUTRAL.get(name))
    ]
    if acting:
        warnings.warn(
            f"the checkpoint's generation_config sets {', '.join(acting)}; not applied: completions are drawn from "
            "the whole distribution at rollout.temperature",
            stacklevel=4,
        )
