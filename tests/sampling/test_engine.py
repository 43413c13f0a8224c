"""The sampler that hands decoding to an engine, here a copy of the policy. tests/vllm has the real one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.load import LoraSpec, add_lora
from rlhf.models.policy import ScoredModel
from rlhf.rollout import Prompt
from rlhf.sampling.completions import Completion, Ends
from rlhf.sampling.vllm import Request, VLLMSampler
from tests.sampling.test_hf import TOKENIZER
from tests.support import tiny_lm

PROMPTS = [Prompt(row_id=index, text=text) for index, text in enumerate(("a b", "c d e", "f"))]


@dataclass
class Copy:
    """Decodes with its own copy of the weights, and takes no more pushes than ``deaf_after``."""

    deaf_after: int | None = None
    pushes: list[dict[str, Tensor]] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    lm: Any = field(default_factory=lambda: tiny_lm(9).eval())

    def push(self, config: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.pushes.append({name: value.clone() for name, value in weights})
        if self.deaf_after is None or len(self.pushes) <= self.deaf_after:
            self.lm.load_state_dict(self.pushes[-1])

    @torch.no_grad()
    def decode(self, requests: Sequence[Request], max_new_tokens: int, ends: Ends) -> list[Completion]:
        self.asked += requests
        found = []
        for request in requests:
            ids, logprobs = list(request.prompt_ids), []
            generator = torch.Generator().manual_seed(request.seed or 0)
            for _ in range(max_new_tokens):
                logits = self.lm(torch.tensor([ids])).logits[0, -1].float()
                known = (logits / (request.temperature or 1.0)).log_softmax(-1)
                choice = (
                    torch.multinomial(known.exp(), 1, generator=generator) if request.temperature else known.argmax()
                )
                ids.append(int(choice))
                logprobs.append(float(known[ids[-1]]))
            found.append(Completion(ids[-max_new_tokens:], torch.tensor(logprobs), False))
        return found


def sampler(engine: Copy) -> VLLMSampler:
    return VLLMSampler(
        engine=engine, tokenizer=TOKENIZER, samples_per_prompt=2, max_new_tokens=4, temperature=0.7, seed=3
    )


def test_every_rollout_is_decoded_with_the_weights_of_its_time() -> None:
    engine, policy = Copy(), ScoredModel(tiny_lm(0)).causal_lm
    draw = sampler(engine)
    first = draw.sample(policy, PROMPTS, [0, 1, 2], 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    second = draw.sample(policy, PROMPTS, [0, 1, 2], 2)  # checked against the policy, or it would raise
    assert first.group.tolist() == [0, 0, 1, 1, 2, 2] and first.sample.tolist() == [0, 1] * 3
    assert not torch.equal(first.completion_ids, second.completion_ids)
    assert draw.greedy(policy, PROMPTS, [0, 1, 2], 3).completion_ids.shape == (3, 4)


def test_a_row_has_its_own_seed_whatever_is_decoded_beside_it() -> None:
    engine, policy = Copy(), ScoredModel(tiny_lm(0)).causal_lm
    draw = sampler(engine)
    together = draw.sample(policy, PROMPTS, [4, 5, 6], 2)
    alone = draw.sample(policy, PROMPTS[1:2], [5], 2)
    assert together.completion_ids[2:4].tolist() == alone.completion_ids.tolist()
    assert len({request.seed for request in engine.asked}) == 6


@pytest.mark.parametrize("takes", [0, 1])
def test_weights_that_did_not_arrive_end_the_run(takes: int) -> None:
    policy = ScoredModel(tiny_lm(0)).causal_lm
    with pytest.raises(UserError, match="the weights did not arrive"):
        sampler(Copy(deaf_after=takes)).sample(policy, PROMPTS, [0, 1, 2], 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft, of transformers
def test_an_adapter_is_pushed_as_part_of_the_weights() -> None:
    engine, policy = Copy(), add_lora(tiny_lm(0), LoraSpec(4, 8, "all-linear"), 1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    sampler(engine).sample(ScoredModel(policy).causal_lm, PROMPTS, [0, 1, 2], 1)
    assert engine.pushes[-1].keys() == tiny_lm(0).state_dict().keys()


def test_it_leaves_the_policy_as_it_was() -> None:
    scored = ScoredModel(tiny_lm(0), fused=True).train()
    before = {name: value.clone() for name, value in scored.state_dict().items()}
    sampler(Copy()).sample(scored.causal_lm, PROMPTS, [0, 1, 2], 1)
    assert scored.head.fused and all(module.training for module in scored.causal_lm.modules())
    assert all(torch.equal(before[name], value) for name, value in scored.state_dict().items())
