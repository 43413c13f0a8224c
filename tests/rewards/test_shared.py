"""Texts of one prompt in one row score as they do alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.models import scratch
from rlhf.models.prefixes import common_prefix, share_prefixes, shared_length
from rlhf.rewards import model as rewards
from rlhf.rewards.model import RewardModel
from rlhf.rollout import Prompt, Turn

TEXTS = ["It is Paris.", "Paris", "It is not known to me, and to nobody else.", "It is Rome."]
TOKENIZER = scratch.train_tokenizer([*TEXTS, "What is the capital of France?", "Name a colour, please."] * 3, 300)
ASKED = ("What is the capital of France?", "Name a colour, please.", "Hi")
PROMPTS = [Prompt(row_id=i, turns=(Turn(role="user", content=text),)) for i, text in enumerate(ASKED)]


def judge(family: str, **settings: Any) -> RewardModel:
    config = scratch.build_config(
        family, layers=2, hidden_size=32, heads=2, vocab_size=len(TOKENIZER), sliding_window=4
    )
    return RewardModel(name="judge", model=scratch.build_reward_model(config, seed=0), tokenizer=TOKENIZER, **settings)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_the_same_scores(family: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three prompts' four texts each, one of them cut off; to rounding of fp32 sums over rows of other widths."""
    prompts = [prompt for prompt in PROMPTS for _ in TEXTS]
    texts, finished = TEXTS * 3, [True, True, False, True] * 3
    alone = judge(family, shared=False).score_texts(prompts, texts, finished)
    rows: list[int] = []
    forward = RewardModel.forward_groups
    monkeypatch.setattr(
        RewardModel, "forward_groups", lambda self, groups: (rows.append(len(groups)), forward(self, groups))[1]
    )
    shared = judge(family, microbatch_tokens=budget).score_texts(prompts, texts, finished)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)
    assert sum(rows) == 3 and alone.unique().numel() == 12


def test_a_group_that_would_be_too_long_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPTS[0]] * 4
    alone = judge("gemma", shared=False).score_texts(prompts, TEXTS)
    monkeypatch.setattr(rewards, "LONGEST_SHARED", 40)
    source = judge("gemma")
    groups = source._groups(prompts, source.render(prompts, TEXTS, [True] * 4), [0, 1, 2, 3])
    assert 1 < len(groups) < 4 and sorted(i for group in groups for i in group) == [0, 1, 2, 3]
    torch.testing.assert_close(source.score_texts(prompts, TEXTS), alone, rtol=0, atol=1e-6)


def test_a_model_whose_masks_are_not_known_scores_row_by_row() -> None:
    source = judge("gemma")
    source.model.config.model_type = "other"  # type: ignore[union-attr]
    assert source._groups([PROMPTS[0]] * 2, [[1, 2], [1, 3]], [0, 1]) == [[0], [1]]


def test_prefixes_by_hand() -> None:
    """Merges across the seam: the common part is of tokens, and each text keeps one of its own."""
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2]]) == 1 and common_prefix([[7], [8, 9]]) == 0
    assert shared_length([[1, 2, 3], [1, 2, 4, 5]]) == 5
    rows = share_prefixes([[[1, 2, 3], [1, 2, 4, 5]], [[6]]])
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 2, 3] and rows.segments[0].tolist() == [0, 0, 1, 2, 2]
    assert rows.segments[1].tolist() == [1, -1, -1, -1, -1] and rows.last.tolist() == [2, 4, 5]
