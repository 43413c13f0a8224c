"""Completions that share a row with their prompt have the statistics and the gradient of rows of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import StatsRequest
from rlhf.models import masks, scratch
from rlhf.models.critic import Critic
from rlhf.models.layout import Layout, SharedPrompts, plain_rows
from rlhf.models.load import frozen_copy
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.rollout import Rollout
from tests.support import fixed_rollout

FAMILIES = ["gemma", "gemma2", "gemma3"]
SHARED = SharedPrompts()


def model(family: str, attention: str | None = None) -> ScoredModel:
    """With a critic of the same family; windows of 4 tokens in Gemma 2 and 3."""
    config = scratch.build_config(family, layers=2, hidden_size=32, heads=2, vocab_size=300, sliding_window=4)
    policy = ScoredModel(
        scratch.build_causal_lm(config, seed=0), critic=Critic(scratch.build_reward_model(config, seed=1))
    )
    for part in (policy.causal_lm, policy.critic.classifier):  # type: ignore[union-attr]
        if attention is not None:
            part.config._attn_implementation = attention  # type: ignore[union-attr]
    return policy


def rollout() -> Rollout:
    """Three prompts of 3 to 5 tokens, four completions each of 3 to 7, in an order that mixes the groups."""
    whole = fixed_rollout(prompts=3, k=4)
    return whole.select([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])


def statistics(policy: ScoredModel, layout: Layout, batch: Rollout) -> Any:
    reference = FrozenReference(ScoredModel(frozen_copy(model("gemma").causal_lm)))
    if policy.causal_lm.config.model_type != "gemma":  # type: ignore[union-attr]
        reference = FrozenReference(ScoredModel(frozen_copy(policy.causal_lm)))
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(1.03)
    rows = layout(batch)
    request = StatsRequest(temperature=0.9, entropy=True, score_norms=True, values=True, reference=True)
    return token_stats(policy, rows, request, reference.states(rows))


@pytest.mark.parametrize(
    ("family", "attention"), [("gemma", "sdpa"), ("gemma", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa")]
)
def test_statistics_are_those_of_plain_rows(family: str, attention: str) -> None:
    policy, batch = model(family, attention), rollout()
    rows = SHARED(batch)
    assert rows.segments is not None and rows.input_ids.shape[0] == 3  # or nothing is compared
    plain, shared = statistics(policy, plain_rows, batch), statistics(policy, SHARED, batch)
    for name in ("logprobs", "entropy", "score_norms", "kl", "ref_logprobs", "values"):
        one, other = getattr(plain, name), getattr(shared, name)
        torch.testing.assert_close(other, one, atol=2e-5, rtol=0)  # fp32 sums over rows of other widths
        assert bool(one[batch.completion_mask].any())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_plain_rows(family: str) -> None:
    gradients = []
    for layout in (plain_rows, SHARED):
        policy, batch = model(family), rollout()
        stats = statistics(policy, layout, batch)
        weight = torch.linspace(-1, 1, stats.logprobs.numel()).view_as(stats.logprobs) * batch.completion_mask
        loss = (weight * (stats.logprobs + stats.values + 0.3 * stats.kl)).sum()
        found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
        gradients.append(torch.cat([part.flatten() for part in found if part is not None]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5


def test_a_neighbour_has_no_influence() -> None:
    """Another first completion of a group: the others' statistics do not change by a bit more than rounding."""
    policy, batch = model("gemma3"), rollout()
    changed = batch.completion_ids.clone()
    changed[0, :2] = 7
    one = statistics(policy, SHARED, batch).logprobs.detach()
    other = statistics(policy, SHARED, replace(batch, completion_ids=changed)).logprobs.detach()
    torch.testing.assert_close(other[1:], one[1:], atol=1e-6, rtol=0)
    assert float((other[0] - one[0]).abs().max()) > 0.01


def test_where_it_does_not_pay_rows_are_plain() -> None:
    batch = rollout()
    alone = batch.select([0, 1, 2])  # one completion of each prompt
    assert SHARED(alone).segments is None
    assert SharedPrompts(row_tokens=10)(batch).segments is None  # a group would be longer
    other = batch.prompt_ids.clone()
    other[0, -1] += 1
    assert SHARED(replace(batch, prompt_ids=other)).segments is None  # two prompts in a group


def test_the_mask_by_hand() -> None:
    """Prompt of 2, completions of 2 and 1, one pad: columns P P a a b ·."""
    segments, positions = torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.tensor([[0, 1, 2, 3, 2, 0]])
    allowed, distance = masks.tree(segments, positions)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert allowed[0, 0].int().tolist() == expected
    assert distance[0, 0, 4, :2].tolist() == [2, 1]  # b follows the prompt directly: windows count positions


def test_columns_by_hand() -> None:
    batch = Rollout.from_ids(
        [[5, 6], [5, 6], [9]],
        [[10, 11], [12], [13]],
        group=[0, 0, 1],
        prompts=(),
        texts=(),
        sample=Tensor(),
        finished=Tensor(),
    )
    rows = SharedPrompts()(batch)
    assert rows.segments is not None
    assert rows.input_ids.tolist() == [[5, 6, 10, 11, 12], [9, 13, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert rows.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert rows.source.tolist() == [1, 2, 1, 5] and rows.target.tolist() == [10, 11, 12, 13]
