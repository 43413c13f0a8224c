"""Gemma 1 to 4 (text) from tiny random configurations: one trainer for all of them, and nothing of a family is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.interfaces import StatsRequest
from rlhf.models.chat import stop_ids
from rlhf.models.layout import Rows, plain_rows
from rlhf.models.load import export, frozen_copy, load_causal_lm, load_tokenizer
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import (
    END_OF_TURN_ID,
    EOS_ID,
    FAMILIES,
    build_causal_lm,
    build_config,
    train_tokenizer,
)
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Prompt, TokenBatch, Turn, pad_rows
from rlhf.runtime.updater import Term
from rlhf.sampling.hf import HFSampler
from tests.support import prepared, updater, with_reference

TOKENIZER = train_tokenizer(["The film is a small wonder and it knows it.", "a b c d e f g"], 300)
WINDOW = 4  # every row below is longer
PLAIN = StatsRequest()
# Padding changes the shapes of matrix products, hence the order of fp32 sums: 1e-6 measured on logits of order 3.
TOLERANCE = 5e-6

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def language_model(family: str, **changes: Any) -> Any:
    config = build_config(
        family, layers=2, hidden_size=32, heads=2, vocab_size=300, **{"sliding_window": WINDOW, **changes}
    )
    return build_causal_lm(config, seed=0).eval()


def token_rows() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1, 6 and 13 tokens, completions of 9, 1 and 5."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(6, 300, (count,), generator=generator).tolist()

    return [[2, *ids(n)] for n in (0, 5, 12)], [[*ids(n), EOS_ID] for n in (8, 0, 4)]


@torch.no_grad()
def unpadded(lm: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π of each completion token by the causal LM's own forward over one bare row."""
    logits = lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def assert_row_by_row(logprobs: Tensor, lm: Any, prompts: list[list[int]], completions: list[list[int]]) -> None:
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        found = logprobs[row, : len(completion)]
        torch.testing.assert_close(found, unpadded(lm, prompt, completion), atol=TOLERANCE, rtol=0)


def test_padded_rows_have_the_logprobs_of_bare_rows(family: str) -> None:
    """Left-padded prompts, right-padded completions, windows shorter than any row; more padding, of any id."""
    lm = language_model(family)
    prompts, completions = token_rows()
    batch = TokenBatch.from_ids(prompts, completions)
    assert_row_by_row(
        token_stats(ScoredModel(lm), plain_rows(batch), PLAIN).logprobs.detach(), lm, prompts, completions
    )
    junk, none = torch.full((3, 6), 77), torch.zeros(3, 6, dtype=torch.bool)
    wide = replace(
        batch,
        prompt_ids=torch.cat([junk, batch.prompt_ids], 1),
        prompt_mask=torch.cat([none, batch.prompt_mask], 1),
        completion_ids=torch.cat([batch.completion_ids, junk], 1),
        completion_mask=torch.cat([batch.completion_mask, none], 1),
    )
    assert_row_by_row(token_stats(ScoredModel(lm), plain_rows(wide), PLAIN).logprobs.detach(), lm, prompts, completions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_padding_on_one_side(family: str, side: str) -> None:
    """Rows as another layout would make them: prompt and completion together, padded as a whole."""
    lm = language_model(family)
    prompts, completions = token_rows()
    ids, mask = pad_rows([p + c for p, c in zip(prompts, completions, strict=True)], side=side)
    row, column = mask.nonzero(as_tuple=True)
    first = mask.int().argmax(1)
    starts = torch.tensor([len(p) for p in prompts])
    scored = column - first[row] >= starts[row]  # completion tokens
    row, column = row[scored], column[scored]
    rows = Rows(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(1) - 1).clamp_min(0),
        source=row * ids.shape[1] + column - 1,
        target=ids[row, column],
        place=row * 9 + column - first[row] - starts[row],
        shape=(3, 9),
    )
    assert_row_by_row(token_stats(ScoredModel(lm), rows, PLAIN).logprobs.detach(), lm, prompts, completions)


def test_positions_start_at_the_first_real_token(family: str) -> None:
    batch = TokenBatch.from_ids([[2], [2, 7, 8]], [[9, 1], [1]])
    assert plain_rows(batch).position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    # The model reads them: the same tokens with a gap in their positions are another sentence.
    model, rows = ScoredModel(language_model(family)), plain_rows(batch)
    apart = replace(rows, position_ids=rows.position_ids + 3 * (torch.arange(5) > 2))
    here, there = (token_stats(model, r, PLAIN).logprobs.detach() for r in (rows, apart))
    assert float((here - there).abs().max()) > 1e-4


def test_the_window_is_in_the_logprobs(family: str) -> None:
    """The same weights with a window wider than the rows: other numbers, except in Gemma 1, which has none."""
    prompts, completions = token_rows()
    rows = plain_rows(TokenBatch.from_ids(prompts, completions))
    narrow, wide = (
        token_stats(ScoredModel(language_model(family, sliding_window=w)), rows, PLAIN).logprobs.detach()
        for w in (WINDOW, 64)
    )
    assert torch.equal(narrow, wide) == (family == "gemma")


def test_the_softcap_of_the_family_is_applied(family: str) -> None:
    """Logits of order 60, where Gemma 2's cap of 30 leaves nothing as it was."""
    lm = language_model(family)
    with torch.no_grad():
        lm.model.norm.weight.add_(60.0)
    model = ScoredModel(lm)
    assert model.head.softcap == (30.0 if family == "gemma2" else None)
    prompts, completions = token_rows()
    found = token_stats(model, plain_rows(TokenBatch.from_ids(prompts, completions)), PLAIN).logprobs.detach()
    if family == "gemma2":
        assert float(found.min()) >= -60.0 - 6.0  # two caps apart at most, and log 300 for the rest of the vocabulary
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        # relative: fp32 rounding of logits of order 60
        torch.testing.assert_close(
            found[row, : len(completion)], unpadded(lm, prompt, completion), atol=1e-4, rtol=1e-5
        )


def prompts_of_both_kinds() -> list[Prompt]:
    return [
        Prompt(row_id=0, text="The film"),
        Prompt(row_id=1, turns=(Turn(role="user", content="is it a small wonder?"),)),
    ]


def sampler() -> HFSampler:
    return HFSampler(
        tokenizer=TOKENIZER, samples_per_prompt=4, max_new_tokens=10, stop_ids=(EOS_ID, END_OF_TURN_ID), seed=3
    )


def test_sampler_and_trainer_agree(family: str) -> None:
    """The KV cache, windows included, against one forward of the trainer."""
    lm = language_model(family)
    rollout = sampler().sample(lm, prompts_of_both_kinds(), [0, 1], step=1)
    assert rollout.rollout_logprobs is not None and int(rollout.lengths.min()) > WINDOW
    trained = token_stats(ScoredModel(lm), plain_rows(rollout), PLAIN).logprobs.detach()
    assert float((trained - rollout.rollout_logprobs).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    "objective", [Reinforce(beta=0.1), Reinforce(beta=0.1, estimator="exact")], ids=["k1", "exact"]
)
def test_one_update_moves_every_weight(family: str, objective: Reinforce) -> None:
    lm = language_model(family)
    reference = FrozenReference(ScoredModel(frozen_copy(lm)))
    model = ScoredModel(lm)
    rollout = sampler().sample(lm, prompts_of_both_kinds(), [0, 1], step=1)
    scored = replace(with_reference(rollout, reference, budget=10_000), rewards=torch.arange(8.0).sin())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = updater(model, reference, budget=10_000).step(
        [Term(objective=objective, batch=prepared(scored, objective))], 1
    )
    known = scored.ref_logprobs if report.stats[0].ref_logprobs is None else report.stats[0].ref_logprobs
    assert report.applied and torch.equal(report.stats[0].logprobs, known)  # KL 0, to the last bit, before the update
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_an_exported_policy_is_the_same_policy(family: str, tmp_path: Path) -> None:
    lm = language_model(family)
    model = ScoredModel(lm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    folder, stops = tmp_path / "final", stop_ids(TOKENIZER, lm.generation_config)
    export(lm, TOKENIZER, folder, stop_ids=stops, card="# A policy\n")
    prompts, completions = token_rows()
    rows = plain_rows(TokenBatch.from_ids(prompts, completions))
    expected = token_stats(model, rows, PLAIN).logprobs
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), load_causal_lm(str(folder))):
        assert torch.equal(token_stats(ScoredModel(loaded), rows, PLAIN).logprobs, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]  # no staging folder is left
    assert (folder / "README.md").read_text() == "# A policy\n"
    assert AutoTokenizer.from_pretrained(folder).chat_template == load_tokenizer(str(folder)).chat_template


def test_every_stop_id_survives_the_export(family: str, tmp_path: Path) -> None:
    """Turns end in <end_of_turn>; a generation config that knows <eos> only would never stop a chat."""
    lm = language_model(family)
    lm.generation_config.eos_token_id = EOS_ID
    stops = stop_ids(TOKENIZER, lm.generation_config)
    assert stops == (EOS_ID, END_OF_TURN_ID)
    export(lm, TOKENIZER, tmp_path / "final", stop_ids=stops, card="")
    again = GenerationConfig.from_pretrained(tmp_path / "final")
    assert again.eos_token_id == [EOS_ID, END_OF_TURN_ID]
    assert stop_ids(load_tokenizer(str(tmp_path / "final")), again) == stops
