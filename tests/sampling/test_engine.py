"""The sampler that hands decoding to an engine, here a copy of the policy. tests/vllm has the real one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.load import LoraSpec, add_lora
from rlhf.models.policy import ScoredModel
from rlhf.rollout import Group, Prompt
from rlhf.sampling.ahead import AheadSampler
from rlhf.sampling.completions import Completion, Ends
from rlhf.sampling.engine import EngineSampler, Request, Shared
from tests.sampling.engines import Copy
from tests.sampling.test_hf import TOKENIZER
from tests.support import tiny_lm

PROMPTS = [Prompt(row_id=index, text=text) for index, text in enumerate(("a b", "c d e", "f"))]


def sampler(engine: Copy) -> EngineSampler:
    return EngineSampler(
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


@pytest.mark.parametrize("tells", [False, True])
def test_it_tells_of_every_prompt_once_whether_the_engine_tells_of_rows_or_not(tells: bool) -> None:
    told: list[tuple[Group, int]] = []
    draw = replace(sampler(Copy(tells=tells)), ended=lambda group, step: told.append((group, step)))
    policy = ScoredModel(tiny_lm(0)).causal_lm
    found = draw.sample(policy, PROMPTS, [4, 5, 6], 1)
    assert told == [(group, 1) for group in found.groups()]
    later = draw.begin(policy, PROMPTS, [4, 5, 6], 2)()  # after a look at a few tokens, of which nobody is told
    assert told[3:] == [(group, 2) for group in later.groups()]
    draw.greedy(policy, PROMPTS, [4, 5, 6], 3)
    assert len(told) == 6


# --- one step ahead --------------------------------------------------------------------------------------------------


def test_a_step_ahead_is_decoded_with_the_weights_before_the_update() -> None:
    """Step t's update is × 1.1: the completions of step t + 1 are those of a policy without it."""
    engine, policy = Copy(), ScoredModel(tiny_lm(0)).causal_lm
    draw = AheadSampler(sampler=sampler(engine), prompts_of=lambda step: (PROMPTS, [0, 1, 2]), steps=3)
    found, expected = [], []
    for step in (1, 2, 3):
        expected.append(sampler(Copy()).sample(policy, PROMPTS, [0, 1, 2], step + 1))
        found.append(draw.sample(policy, PROMPTS, [0, 1, 2], step))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
    first = sampler(Copy()).sample(ScoredModel(tiny_lm(0)).causal_lm, PROMPTS, [0, 1, 2], 1)
    assert found[0].completion_ids.tolist() == first.completion_ids.tolist()
    for late, old in zip(found[1:], expected, strict=False):
        assert late.completion_ids.tolist() == old.completion_ids.tolist()
        assert late.old_logprobs is not None and torch.equal(late.old_logprobs, old.rollout_logprobs)
    # the first, before it was there; the second and third, each after a look at three rows; nothing after the last
    assert engine.log == ["push", *3 * ["push", "begin 3", "begin 6"]]


def test_weights_that_did_not_arrive_are_found_out_before_the_update() -> None:
    engine, policy = Copy(deaf_after=2), ScoredModel(tiny_lm(0)).causal_lm
    draw = AheadSampler(sampler=sampler(engine), prompts_of=lambda step: (PROMPTS, [0, 1, 2]), steps=3)
    draw.sample(policy, PROMPTS, [0, 1, 2], 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.flip(0))
    with pytest.raises(UserError, match="the weights did not arrive"):
        draw.sample(policy, PROMPTS, [0, 1, 2], 2)


# --- one engine for several processes --------------------------------------------------------------------------------


@dataclass
class Rank:
    """A process of a job whose processes are threads."""

    rank: int
    board: dict[int, Any]
    met: threading.Barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.met.wait(10)
        found = [self.board[rank] for rank in range(self.met.parties)]
        self.met.wait(10)
        return found


def on_two(engine: Copy, act: Any) -> list[Any]:
    """``act(Shared, rank)`` on both ranks: what it returned, or the UserError it raised."""
    board: dict[int, Any] = {}
    met, results = threading.Barrier(2), [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = act(Shared(engine, Rank(rank, board, met)), rank)
        except UserError as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_process_gets_its_own_rows_from_the_one_engine() -> None:
    engine, weights = Copy(), tiny_lm(0).state_dict()
    rows = [[Request([5, 6], 1.0, 1), Request([7], 1.0, 2)], [Request([8], 1.0, 3)]]

    def act(shared: Shared, rank: int) -> list[Completion]:
        shared.push(None, weights.items())
        return shared.begin(rows[rank], 3, Ends(TOKENIZER))()

    first, second = on_two(engine, act)
    assert engine.log == ["push", "begin 3"]
    alone = Copy(lm=tiny_lm(0).eval())
    assert [row.ids for row in (*first, *second)] == [alone.decode(row, 3).ids for part in rows for row in part]


def test_the_first_process_is_told_of_its_own_rows_alone() -> None:
    engine, told = Copy(tells=True), {0: list[int](), 1: list[int]()}
    rows = [[Request([5, 6], 1.0, 1), Request([7], 1.0, 2)], [Request([8], 1.0, 3)]]

    def act(shared: Shared, rank: int) -> list[Completion]:
        return shared.begin(rows[rank], 3, Ends(TOKENIZER), lambda row, *_: told[rank].append(row))()

    on_two(engine, act)
    assert told == {0: [0, 1], 1: []}


def test_what_the_engine_refuses_ends_every_process() -> None:
    @dataclass
    class Refuses(Copy):
        texts: list[str] = field(default_factory=lambda: ["no room"])

        def begin(self, *args: Any) -> Any:
            raise UserError(self.texts[0])

    both = on_two(Refuses(), lambda shared, rank: shared.begin([Request([5], 1.0, 1)], 3, Ends(TOKENIZER))())
    assert [str(error) for error in both] == ["no room", "no room"]
