"""Demonstrations as token rows: which tokens are imitated, and that the loss sees those alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.data.examples import Demonstration
from rlhf.interfaces import TokenStats
from rlhf.models.scratch import train_tokenizer
from rlhf.objectives.supervised import DemonstrationBatch, Demonstrations
from rlhf.programs.streams import ShuffledDemonstrations, ShuffledPrompts, dealt, demonstration_ids
from rlhf.rollout import Prompt, Turn


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["hello there, how is it going"] * 5, 300)


def dialogue() -> Demonstration:
    turns = (("user", "hello"), ("assistant", "there"), ("user", "how"))
    return Demonstration(Prompt(row_id=0, turns=tuple(Turn(role=r, content=c) for r, c in turns)), "is it")


def counted_text(tokenizer: Any, completion_only: bool, every_turn: bool) -> str:
    row, whole = demonstration_ids(dialogue(), tokenizer, completion_only=completion_only, every_turn=every_turn)
    assert whole
    kept = [token for token, counts in zip(row.completion, row.counted, strict=True) if counts]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def test_which_tokens_are_imitated(tokenizer: Any) -> None:
    assert counted_text(tokenizer, True, True) == "there<end_of_turn>is it<end_of_turn>"
    assert counted_text(tokenizer, True, False) == "is it<end_of_turn>"
    everything = counted_text(tokenizer, False, True)  # all but the first token, which nothing predicts
    assert everything.startswith("<start_of_turn>user\nhello") and everything.endswith("is it<end_of_turn>")


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_reply(tokenizer: Any) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = own.replace("message['content'] +", "(message['content'] if loop.last else 'x') +")
    try:
        row, whole = demonstration_ids(dialogue(), tokenizer, completion_only=True, every_turn=True)
    finally:
        tokenizer.chat_template = own
    assert not whole
    assert all(row.counted) and tokenizer.decode(row.completion) == "is it<end_of_turn>"


def test_the_loss_is_the_mean_over_counted_tokens_alone() -> None:
    batch = DemonstrationBatch.of([([2, 5], [6, 7, 8], [True, False, True]), ([2], [9], [True])])
    stats = TokenStats(logprobs=torch.tensor([[-1.0, -50.0, -2.0], [-4.0, 0.0, 0.0]]))
    objective = Demonstrations()
    total = objective.loss_sum(stats, batch)["sft"]
    assert float(total) == 7.0 and int(objective.count(batch)) == 3
    assert batch.completion_mask.tolist() == [[True, True, True], [True, False, False]]  # all of them are read


def test_a_stream_keeps_the_marks_with_their_rows(tokenizer: Any) -> None:
    rows = [demonstration_ids(dialogue(), tokenizer, completion_only=True, every_turn=True)[0]]
    stream = ShuffledDemonstrations(rows=rows, per_step=2, seed=0, own=slice(0, 2))
    batch = stream.at(1)
    assert batch.counted.sum(1).tolist() == [sum(rows[0].counted)] * 2
    assert batch.select([1]).counted.shape == batch.completion_ids.select(0, 1)[None].shape


def test_prompts_are_dealt_so_that_ranks_finish_together() -> None:
    """Lengths 9 8 7 6 5 4 to two: 9, 6, 5 and 8, 7, 4; to three: 9, 4 · 8, 5 · 7, 6. In the order of the step."""
    assert dealt([9, 8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2, 5]]
    assert dealt([4, 5, 6, 7, 8, 9], 3) == [[0, 5], [1, 4], [2, 3]]
    assert dealt([3, 1, 2], 1) == [[0, 1, 2]]


def test_every_rank_has_its_own_prompts_of_the_step_one_process_has() -> None:
    prompts = [Prompt(row_id=at, text="x" * (at * 7 % 5)) for at in range(10)]
    whole, slots = ShuffledPrompts(prompts=prompts, per_step=6, seed=3).at(2)
    shares = [ShuffledPrompts(prompts=prompts, per_step=6, seed=3, rank=rank, ranks=2).at(2) for rank in (0, 1)]
    assert slots == list(range(6)) and sorted(shares[0][1] + shares[1][1]) == slots
    for own, places in shares:
        assert [prompt.row_id for prompt in own] == [whole[place].row_id for place in places] and len(own) == 3
