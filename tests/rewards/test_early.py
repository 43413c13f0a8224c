"""A prompt's completions are scored while others are decoded; the scores are those of asking when all are there."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rlhf.errors import ExitCode, UserError
from rlhf.interfaces import Ended
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.early import covered
from rlhf.rollout import Group, Rollout
from tests.rewards.serving import client, made_up, running, scripted, texts, tiny
from tests.rewards.test_server import as_many, numbers
from tests.sampling.test_hf import sampler
from tests.sampling.test_hf import tiny as policy
from tests.sampling.test_loop import MANY, STOPS

JUDGE = tiny()


def rollout(rows: int, k: int = 4) -> Rollout:
    prompts, completions, finished = texts(rows, k)
    return Rollout.from_ids(
        [[5]] * rows,
        [[6]] * rows,
        group=[row // k for row in range(rows)],
        prompts=tuple(prompts),
        texts=tuple(completions),
        sample=torch.arange(rows) % k,
        finished=torch.tensor(finished),
    )


def test_groups_are_the_rows_prompt_by_prompt() -> None:
    groups = list(rollout(6).groups())
    assert [group.slot for group in groups] == [0, 1]
    ids, said = ((6,), (6,)), (" is 4 wonders", " is 5 wonders")
    assert groups[1] == Group(1, rollout(6).prompts[4], (5,), ids, said, (True, True))


def test_scores_do_not_depend_on_when_they_were_asked_for() -> None:
    """To the last bit, prompts in any order and from several threads. All in one request differ by rounding alone."""
    batch = rollout(48)
    with running(JUDGE) as server:
        source = client(server.url)
        rewards = RewardSet(models=[(source, 1.0)])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda group: rewards.ended(group, 1), reversed(list(batch.groups()))))
        early = rewards.score(batch, 1).scores["judge"]
        late = source.begin(batch, 1, [source.ask(group) for group in batch.groups()])()
        whole = rewards.score(batch, 2).scores["judge"]  # of this step nothing was asked before
    assert float(early.std()) > 0.1 and torch.equal(early, late)
    torch.testing.assert_close(early, whole, rtol=0, atol=1e-6)


def test_every_row_is_asked_for_once_whoever_ended_early() -> None:
    """Prompts 4 and 1 ended early, of step 1; the other ten are asked for with the rollout, one request a prompt."""
    batch = rollout(48)
    groups = list(batch.groups())
    with scripted(made_up(), as_many) as script:
        rewards = RewardSet(models=[(client(script.url), 1.0)])
        for slot in (4, 1):
            rewards.ended(groups[slot], 1)
        scored = rewards.score(batch, 1)
    assert scored.scores["made-up"].tolist() == list(range(48))
    asked = [[row["completion"] for row in json.loads(body)["rows"]] for body in script.asked]
    assert sorted(asked) == sorted(list(group.texts) for group in groups)


def test_a_step_that_is_decoded_ahead_is_kept_apart() -> None:
    batch = rollout(8)
    with scripted(made_up(), as_many) as script:
        rewards = RewardSet(models=[(client(script.url), 1.0)])
        for step in (1, 2):
            for group in batch.groups():
                rewards.ended(group, step)
        assert [rewards.score(batch, step).scores["made-up"].tolist() for step in (2, 1)] == [list(range(8))] * 2
    assert len(script.asked) == 4 and not rewards.early.asked


def test_what_fails_early_ends_the_run_where_scores_are_waited_for() -> None:
    batch = rollout(8)
    with scripted(made_up(), numbers(1.0)) as script:
        rewards = RewardSet(models=[(client(script.url), 1.0)])
        for group in batch.groups():
            rewards.ended(group, 1)
        finish = rewards.begin(batch, 1)
        with pytest.raises(UserError, match="1 scores for 4 completions") as info:
            finish(batch)
    assert info.value.code == ExitCode.REWARD_GONE


def test_a_real_server_scores_while_our_loop_decodes() -> None:
    """The last prompt to end waits for the first one's scores: that they come shows that they were asked for before."""
    with running(JUDGE) as server:
        rewards = RewardSet(models=[(client(server.url, give_up_seconds=60.0), 1.0)])
        told: list[int] = []

        def ended(group: Group, step: int) -> None:
            rewards.ended(group, step)
            told.append(group.slot)
            if len(told) == len(MANY):
                first: Any = rewards.early.asked[step]["judge", told[0]]
                assert len(first.requests[0].result(timeout=60)) == 2

        found = draw(ended)
        scored = rewards.score(found, 1)
        hidden = rewards.metrics(scored)["time/score_hidden_seconds"]
    assert sorted(told) == list(range(len(MANY))) and told != sorted(told)
    assert bool(scored.valid.all()) and hidden > 0


def draw(ended: Ended) -> Rollout:
    settings: dict[str, Any] = {"samples_per_prompt": 2, "stop_ids": STOPS, "max_new_tokens": 24}
    return sampler(ended=ended, **settings).sample(policy(), MANY, range(len(MANY)), 1)


def test_seconds_that_several_spans_cover() -> None:
    """1 to 4 and 5 to 6, of which the last half second lies behind 5.5; what is within another counts once."""
    spans = [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75), (7.0, 8.0)]
    assert covered(spans, until=5.5) == 3.5 and covered(spans, until=10.0) == 5.0 and covered([], 1.0) == 0.0
