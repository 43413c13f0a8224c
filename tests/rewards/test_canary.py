"""What a reward model is refused for, in one line, before a policy is loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.scratch import build_config, build_reward_model, train_tokenizer
from rlhf.rewards import canary
from rlhf.rewards.model import load_reward_model

TOKENIZER = train_tokenizer(["The film is a small wonder and it knows it.", "What is the capital of France?"], 320)


def tiny(vocabulary: int = len(TOKENIZER), **changes: Any) -> Any:
    settings: dict[str, Any] = {"layers": 1, "hidden_size": 32, "heads": 2, "vocab_size": vocabulary}
    return build_reward_model(build_config("gemma", **{**settings, **changes}), seed=1)


def refusal(model: Any, folder: Path, tokenizer: Any = TOKENIZER) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError) as info:
        load_reward_model(str(folder), device="cpu")
    assert "\n" not in str(info.value) and str(info.value).startswith(f"reward.models: path={folder}: ")
    return str(info.value)


def test_a_sound_model_passes_quickly(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path), device="cpu")
    began = time.process_time()
    canary.scores_mean_something(loaded.forward, loaded.model, TOKENIZER, where="here", max_tokens=None, tolerance=1e-4)
    assert time.process_time() - began < 5  # six forwards of five short rows
    low = load_reward_model(str(tmp_path), device="cpu", compute_dtype=torch.bfloat16)
    assert low.compute_dtype == torch.bfloat16


def test_an_untrained_head(tmp_path: Path) -> None:
    model = tiny()
    nn.init.zeros_(model.score.weight)
    assert "gives 5 different texts the same score (0), so its head was never trained" in refusal(model, tmp_path)


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    model = tiny()
    nn.init.constant_(model.score.weight, torch.nan)
    assert "scores [nan, nan, nan, nan, nan] on plain texts" in refusal(model, tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    said = refusal(tiny(vocabulary=300), tmp_path)
    assert f"has {len(TOKENIZER)} tokens and the model embeds 300, so it is another model's tokenizer" in said


def test_an_added_token_that_text_becomes(tmp_path: Path) -> None:
    other = train_tokenizer(["The film is a small wonder and it knows it.", "What is the capital of France?"], 320)
    other.add_tokens(["<never>"])
    model = tiny()
    model.save_pretrained(tmp_path / "unused")
    other.save_pretrained(tmp_path / "unused")
    load_reward_model(str(tmp_path / "unused"), device="cpu")  # one more than the model embeds, and no text becomes it
    other.add_tokens(["Paris"])
    said = refusal(model, tmp_path / "used", other)
    assert f"gives id {len(TOKENIZER) + 1} and the model embeds {len(TOKENIZER)}" in said


class Neighbourly(nn.Module):
    """A head that looks at the other rows, as batch statistics do."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.head(hidden)
        return scores - scores.mean(0)


def test_a_score_that_depends_on_its_neighbours(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded: Any = load_reward_model(str(tmp_path), device="cpu")
    head = loaded.model.score

    def shifted(rows: Any) -> Tensor:
        scores: Tensor = loaded.forward(rows)
        return scores + 1e-3 * (len(rows) > 1)  # far less than what would be seen in a curve

    with pytest.raises(UserError, match=r"changes by 0\.001 with the texts that are padded beside it"):
        canary.scores_mean_something(shifted, loaded.model, TOKENIZER, where="x", max_tokens=None, tolerance=1e-4)
    loaded.model.score = Neighbourly(head)
    with pytest.raises(UserError, match="padded beside it"):
        canary.scores_mean_something(
            loaded.forward, loaded.model, TOKENIZER, where="x", max_tokens=None, tolerance=1e-4
        )


def test_a_context_too_short_for_the_texts_is_no_fault(tmp_path: Path) -> None:
    tiny(max_positions=4).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    load_reward_model(str(tmp_path), device="cpu")
