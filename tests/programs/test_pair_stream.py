"""Pairs by prompt: whole prompts in a step, each completion once, the same on every resume and every rank."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rlhf.data.examples import Preference
from rlhf.interfaces import TokenStats
from rlhf.models.scratch import train_tokenizer
from rlhf.objectives.supervised import BradleyTerry, PairBatch
from rlhf.programs.streams import PromptPairs, ShuffledPairs, by_prompt, pair_batch
from rlhf.rollout import Prompt, Turn
from rlhf.runtime import microbatches

TOKENIZER = train_tokenizer(["one two three four five six seven eight nine"], 300)


def ranked(question: str, replies: int, row_id: int = 0) -> list[Preference]:
    """All pairs of replies that were ranked: reply i is better than reply j > i."""
    prompt = Prompt(row_id=row_id, turns=(Turn(role="user", content=question),))
    return [
        Preference(prompt, f"{question} {i}", f"{question} {j}", float(j - i))
        for i, j in combinations(range(replies), 2)
    ]


def labelled(count: int) -> list[Preference]:
    return [Preference(Prompt(row_id=i), f"good {i}", f"bad {i}") for i in range(count)]


PAIRS = [pair for index, replies in enumerate((4, 2, 3, 2, 3)) for pair in ranked(f"q{index}", replies, index)]


def stream(
    pairs: list[Preference], per_step: int = 2, own: slice | None = None, limit: int | None = None
) -> ShuffledPairs:
    prompts: list[PromptPairs] = by_prompt(pairs)
    return ShuffledPairs(
        epoch_prompts=lambda epoch: prompts,
        per_epoch=len(prompts),
        per_step=per_step,
        seed=3,
        own=own or slice(0, per_step),
        tokenizer=TOKENIZER,
        pairs_per_prompt=limit,
    )


def texts(batch: PairBatch) -> list[tuple[str, str]]:
    """(preferred, other) of every pair, as text."""
    better, worse, _ = batch.pairs()
    rows = [
        TOKENIZER.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    return [(rows[i], rows[j]) for i, j in zip(better.tolist(), worse.tolist(), strict=True)]


def test_rows_of_a_prompt_are_found_wherever_they_stand() -> None:
    mixed = PAIRS[::2] + PAIRS[1::2]
    assert sorted(len(pairs) for pairs in by_prompt(mixed)) == [1, 1, 3, 3, 6]
    assert [len(pairs) for pairs in by_prompt(labelled(3))] == [1, 1, 1]  # texts without a prompt share none
    twice = labelled(1) * 2  # a source of weight 2
    assert len(by_prompt(twice)) == 2


def test_each_completion_is_one_row() -> None:
    batch = pair_batch([ranked("q", 4)], TOKENIZER)
    assert len(batch) == 4 and batch.group.tolist() == [0] * 4 and batch.member.tolist() == [0, 1, 2, 3]
    assert texts(batch) == [(f"q {i}", f"q {j}") for i, j in combinations(range(4), 2)]
    assert batch.pairs().margin.tolist() == [1, 2, 3, 1, 2, 1]


def test_the_loss_is_that_of_the_pairs_one_by_one() -> None:
    batch = pair_batch([ranked("q", 3), ranked("r", 2)], TOKENIZER)
    scores = torch.tensor([2.0, 1.5, 0.5, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = BradleyTerry().loss_sum(TokenStats(logprobs=torch.zeros(0), scores=scores), batch)["reward"]
    differences = torch.tensor([2.0 - 1.5 - 1, 2.0 - 0.5 - 2, 1.5 - 0.5 - 1, -1.0 - 1.0 - 1], dtype=torch.float64)
    assert float(loss.detach()) == pytest.approx(float(torch.log1p((-differences).exp()).sum()))
    assert int(BradleyTerry().count(batch)) == 4


def test_a_prompt_is_never_cut_over_microbatches() -> None:
    batch = pair_batch([ranked(f"q{i}", 2 + i % 3) for i in range(6)], TOKENIZER)
    cuts = microbatches.split(batch, 40)
    assert len(cuts) > 2
    found = [pair for cut in cuts for pair in texts(cut.batch)]
    assert sorted(found) == sorted(texts(batch))
    invalid = microbatches._filler(cuts[0]).batch  # what a rank with fewer prompts runs instead
    assert int(BradleyTerry().count(invalid)) == 0 and len(invalid.pairs().better) == 0


def test_a_step_holds_whole_prompts_and_an_epoch_all_of_them() -> None:
    every = sorted((pair.chosen, pair.rejected) for pair in PAIRS)
    steps = [texts(stream(PAIRS, per_step=1).at(step)) for step in range(1, 11)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(pair for step in epoch for pair in step) == every
    assert steps[:5] != steps[5:]
    for step in steps:
        (question,) = {pair[0].split()[0] for pair in step}
        assert len(step) == sum(pair.chosen.startswith(question) for pair in PAIRS)


def test_ranks_share_the_prompts_of_a_step() -> None:
    both = texts(stream(PAIRS).at(2))
    assert texts(stream(PAIRS, own=slice(0, 1)).at(2)) + texts(stream(PAIRS, own=slice(1, 2)).at(2)) == both


def test_sampled_pairs_are_a_function_of_the_epoch() -> None:
    one = stream(ranked("q", 5), per_step=1, limit=3)
    draws = [tuple(texts(one.at(epoch + 1))) for epoch in range(20)]  # one prompt: a step is an epoch
    assert all(len(set(draw)) == 3 for draw in draws)
    assert len({pair for draw in draws for pair in draw}) == 10  # every pair has its turn
    assert len(set(draws)) > 10
    again = stream(ranked("q", 5), per_step=1, limit=3)
    assert texts(again.at(18)) == list(draws[17])  # a resumed run draws what the first one did
    assert len(texts(stream(ranked("q", 3), per_step=1, limit=9).at(1))) == 3


def test_labelled_text_is_one_pair_a_prompt_as_ever() -> None:
    batch = stream(labelled(8), per_step=4).at(1)
    assert len(batch) == 8 and batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(set(texts(batch))) == 4
    assert [won != () for won in batch.beats] == [True, False] * 4


def test_an_epoch_with_other_prompts_fills_its_slots() -> None:
    epochs = [by_prompt(PAIRS), by_prompt(PAIRS[:-3])]  # a source of weight 0.5 has other rows in every epoch
    source = ShuffledPairs(
        epoch_prompts=lambda epoch: epochs[epoch], per_epoch=5, per_step=5, seed=0, own=slice(0, 5), tokenizer=TOKENIZER
    )
    assert len(set(source.at(1).group.tolist())) == len(set(source.at(2).group.tolist())) == 5
