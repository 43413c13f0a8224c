"""Run by every rank of tests/ranks/test_gather.py: the same completions with whole weights and by layer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from rlhf.interfaces import StatsRequest
from rlhf.models.layout import plain_rows
from rlhf.models.load import load_tokenizer
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.scratch import build_causal_lm, build_config
from rlhf.rollout import Prompt, Rollout, Turn
from rlhf.runtime import decoding, distributed
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.fsdp import decoder_layers
from rlhf.sampling.hf import HFSampler

WORDS = ("tea", "a walk", "the museum", "a birthday", "an old friend")
LONGEST = 16
Gather = Callable[[nn.Module], AbstractContextManager[Any]]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    runtime = distributed.start(max_grad_norm=1.0, compute_dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder / "start"))
    config = build_config("gemma", layers=3, hidden_size=32, heads=2, vocab_size=len(tokenizer))
    policy = ScoredModel(build_causal_lm(config, seed=3))
    model, optimizer = distributed.prepare(runtime, policy, torch.optim.AdamW(policy.parameters(), lr=1e-2))
    facts: list[dict[str, Any]] = []
    for step, prompts in enumerate((_prompts(5 * runtime.rank + 1), _prompts(2 * runtime.rank)), start=1):
        for plain in (False, True):
            facts.append(_compared(runtime, model, policy, tokenizer, prompts, plain, step))
        _update(runtime, model, optimizer, _sampled(tokenizer, policy, _whole(runtime, model), _prompts(1), True, step))
    told = runtime.gather_objects(facts)
    if runtime.main:
        (folder / "facts.json").write_text(json.dumps(told), encoding="utf-8")
    distributed.leave(runtime)


def _prompts(count: int) -> list[Prompt]:
    texts = [f"Thank me for {WORDS[at % len(WORDS)]}{'!' * at}" for at in range(count)]
    return [Prompt(row_id=at, turns=(Turn(role="user", content=text),)) for at, text in enumerate(texts)]


def _compared(
    runtime: Runtime,
    model: nn.Module,
    policy: ScoredModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plain: bool,
    step: int,
) -> dict[str, Any]:
    most: list[int] = [0]

    @contextmanager
    def layered(lm: nn.Module) -> Iterator[None]:
        with decoding.by_layer(runtime, model, lm), _watched(lm, most):
            yield

    one = _sampled(tokenizer, policy, _whole(runtime, model), prompts, plain, step)
    other = _sampled(tokenizer, policy, layered, prompts, plain, step)
    same = [torch.equal(cast(Any, getattr(one, key)), cast(Any, getattr(other, key))) for key in _COMPARED]
    return {"same": same, "lengths": one.completion_mask.sum(1).tolist(), "whole at once": most[0], "plain": plain}


_COMPARED = ("completion_ids", "completion_mask", "rollout_logprobs")


def _whole(runtime: Runtime, model: nn.Module) -> Gather:
    return lambda lm: decoding.whole(runtime, model)


def _sampled(
    tokenizer: Any, policy: ScoredModel, gather: Gather, prompts: Sequence[Prompt], plain: bool, step: int
) -> Rollout:
    """A tenth of the vocabulary ends a completion; the cache is too small for all rows, so that others enter later."""
    sampler = HFSampler(
        tokenizer=tokenizer,
        samples_per_prompt=2,
        max_new_tokens=LONGEST,
        stop_ids=tuple(range(3, len(tokenizer), 10)),
        microbatch_rows=3,
        plain=plain,
        kv_bytes=100_000,
        gather=gather,
    )
    return sampler.sample(policy.causal_lm, prompts, list(range(len(prompts))), step)


@contextmanager
def _watched(lm: nn.Module, most: list[int]) -> Iterator[None]:
    """The most layers whose weights are whole while a layer computes."""
    layers = decoder_layers(lm)

    def count(*_: Any) -> None:
        most[0] = max(most[0], sum(_is_whole(layer) for layer in layers))

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def _is_whole(layer: nn.Module) -> bool:
    weight: Any = cast(Any, layer).mlp.up_proj.weight
    return weight.numel() > 0 if hasattr(weight, "ds_tensor") else not hasattr(weight, "to_local")


def _update(runtime: Runtime, model: nn.Module, optimizer: Any, rollout: Rollout) -> None:
    """The hooks of training are back, and the next rollout is another model's."""
    loss = token_stats(model, plain_rows(rollout), StatsRequest()).logprobs.mean()
    engine = cast(Any, model)
    if runtime.deepspeed:
        engine.set_gradient_accumulation_boundary(is_boundary=True)
        engine.backward(loss)
        engine.step()
    else:
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
