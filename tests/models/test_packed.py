"""Packed rows: the statistics and the gradient of one row per completion, with next to no padding."""

from __future__ import annotations

import pytest
import torch

from rlhf.interfaces import StatsRequest
from rlhf.models import scratch
from rlhf.models.layout import Layout, PackedRows, plain_rows
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.objectives.supervised import DemonstrationBatch, Demonstrations
from rlhf.runtime.microbatches import split
from rlhf.runtime.updater import PolicyForward, Term, Updater
from tests.support import alone, weights

LENGTHS = [(3, 9), (1, 2), (5, 4), (2, 11), (4, 1), (1, 6)]  # tokens of prompt and completion


def batch() -> DemonstrationBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(6, 300, (count,), generator=generator).tolist()

    rows = [(ids(prompt), ids(completion)) for prompt, completion in LENGTHS]
    return DemonstrationBatch.of([(p, c, [index != 1 for index in range(len(c))]) for p, c in rows])


def model(family: str) -> ScoredModel:
    config = scratch.build_config(family, layers=2, hidden_size=32, heads=2, vocab_size=300, sliding_window=4)
    return ScoredModel(scratch.build_causal_lm(config, seed=0))


@pytest.mark.parametrize("width", [13, 20, 2048])
@pytest.mark.parametrize("family", scratch.FAMILIES)
def test_statistics_are_those_of_plain_rows(family: str, width: int) -> None:
    """Windows of 4 tokens in Gemma 2 to 4: a neighbour in the row must stay out of them too."""
    policy, rows, request = model(family), batch(), StatsRequest(entropy=True)
    plain = token_stats(policy, plain_rows(rows), request)
    packed = token_stats(policy, PackedRows(width)(rows), request)
    for one, other in ((plain.logprobs, packed.logprobs), (plain.entropy, packed.entropy)):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)  # fp32 sums over rows of other widths


def test_rows_are_filled_longest_first() -> None:
    """Lengths 12, 3, 9, 13, 5, 7 in rows of 20: 13 + 7, 12 + 5 + 3, 9."""
    rows = PackedRows(20)(batch())
    assert rows.input_ids.shape == (3, 20)
    starts = (rows.position_ids == 0).nonzero().tolist()
    assert [start for start in starts if start[0] == 0] == [[0, 0], [0, 13]]
    assert [start for start in starts if start[0] == 1] == [[1, 0], [1, 12], [1, 17]]


def test_a_completion_longer_than_a_row_widens_it() -> None:
    assert PackedRows(5)(batch()).input_ids.shape[1] == 13


def test_an_empty_prompt_is_refused() -> None:
    rows = DemonstrationBatch.of([([], [7, 8], [True, True])])
    with pytest.raises(ValueError, match="every prompt needs at least one token"):
        PackedRows()(rows)


def change(packing: bool, budget: int) -> torch.Tensor:
    policy = model("gemma2")
    before = weights(policy)
    layout: Layout = PackedRows(20) if packing else plain_rows
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    forward = PolicyForward(layout=layout)
    updater = Updater(alone(), policy, optimizer, lambda step: 1.0, forward, budget, None, layout.cells)
    updater.step([Term(objective=Demonstrations(), batch=batch())], 1)
    return weights(policy) - before


def test_the_gradient_is_that_of_plain_rows_however_it_is_cut() -> None:
    plain = change(packing=False, budget=10_000)
    for budget in (20, 10_000):
        packed = change(packing=True, budget=budget)
        assert float((plain - packed).norm() / plain.norm()) <= 5e-6  # fp32 sums in another order


def test_a_budget_counts_padding_only_where_there_is_any() -> None:
    """49 real tokens; padded to 5 + 11 the six rows are 96."""
    assert int(batch().lengths.sum()) == 49
    assert len(split(batch(), 49, cost=PackedRows().cells)) == 1
    assert len(split(batch(), 49)) > 1
