"""A reward model scores text with its own tokenizer, whatever stands beside a row, or refuses to be loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rlhf.errors import UserError
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.scratch import END_OF_TURN_ID, build_causal_lm, build_config, build_reward_model, train_tokenizer
from rlhf.rewards.model import RewardModel, load_reward_model, short_name
from rlhf.rollout import Prompt, Rollout, Turn

POLICY_TOKENIZER = train_tokenizer(["a wholly different corpus, so other merges"] * 4, 280)
TOKENIZER = train_tokenizer(["The film is a small wonder and it knows it.", "What is the capital of France?"], 320)


def tiny(**changes: Any) -> Any:
    settings: dict[str, Any] = {"layers": 2, "hidden_size": 32, "heads": 2, "vocab_size": len(TOKENIZER)}
    return build_reward_model(build_config("gemma", **{**settings, **changes}), seed=1)


MODEL = tiny()


def source(**changes: Any) -> RewardModel:
    return RewardModel(**{"name": "rm", "model": MODEL, "tokenizer": TOKENIZER, **changes})


def rollout(rows: int = 12) -> Rollout:
    """Conversations and plain texts of many lengths; the ids are the policy's and mean nothing to the reward model."""
    prompts, texts = [], []
    for row in range(rows):
        words = "the film is a small wonder and it knows " * (1 + row % 4)
        chat = Prompt(row_id=row, turns=(Turn(role="user", content=words[: 5 + 3 * row]),))
        prompts.append(chat if row % 2 else Prompt(row_id=row, text=words[: 4 + 2 * row]))
        texts.append(" what is the capital?"[: 3 + row])
    return Rollout.from_ids(
        [render_prompt(POLICY_TOKENIZER, prompt) for prompt in prompts],
        [render_completion(POLICY_TOKENIZER, p, text) for p, text in zip(prompts, texts, strict=True)],
        prompts=tuple(prompts),
        texts=tuple(texts),
        sample=torch.zeros(rows, dtype=torch.long),
        finished=torch.ones(rows, dtype=torch.bool),
    )


@torch.no_grad()
def by_hand(prompt: Prompt, text: str, finished: bool = True, model: Any = MODEL) -> float:
    """One unpadded row through the whole transformers model, read at its last token."""
    ids = render_prompt(TOKENIZER, prompt) + render_completion(TOKENIZER, prompt, text, finished)
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.score(hidden)[0, -1, 0])


def test_scores_are_those_of_single_unpadded_rows() -> None:
    batch = rollout()
    scores = source().score(batch, step=1)
    assert scores.dtype == torch.float32
    exact = [by_hand(prompt, text) for prompt, text in zip(batch.prompts, batch.texts, strict=True)]
    assert float(torch.tensor(exact).std()) > 0.1  # or the next line says nothing
    assert torch.allclose(scores, torch.tensor(exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 100, 400, 100_000])
def test_scores_do_not_depend_on_the_batch(budget: int) -> None:
    batch = rollout()
    scores = source(microbatch_tokens=budget).score(batch, step=1)
    assert torch.allclose(scores, source().score(batch, step=1), rtol=0, atol=1e-6)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    turned = source(microbatch_tokens=budget).score(batch.select(order), step=1)
    assert torch.allclose(turned, scores[order], rtol=0, atol=1e-6)
    assert torch.allclose(source().score(batch.select([3]), step=1), scores[3:4], rtol=0, atol=1e-6)


def test_padding_side_and_pad_token_of_its_tokenizer_are_irrelevant() -> None:
    other = train_tokenizer(["The film is a small wonder and it knows it.", "What is the capital of France?"], 320)
    other.padding_side = "right"
    other.pad_token = other.eos_token
    batch = rollout()
    assert torch.equal(source(tokenizer=other).score(batch, 1), source().score(batch, 1))


def test_the_policys_ids_are_never_read() -> None:
    batch = rollout()
    nonsense = replace(batch, completion_ids=batch.completion_ids.new_full(batch.completion_ids.shape, 9_999_999))
    assert torch.equal(source().score(nonsense, 1), source().score(batch, 1))
    rows = source().token_rows(batch)
    text = batch.prompts[1].turns[0].content
    assert TOKENIZER.decode(rows[1]) == (
        f"<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n{batch.texts[1]}<end_of_turn>"
    )


def test_a_truncated_turn_is_not_closed() -> None:
    batch = rollout()
    cut = replace(batch, finished=torch.arange(len(batch)) != 1)
    rows = source().token_rows(cut)
    assert rows[1][-1] != END_OF_TURN_ID
    assert rows[3][-1] == END_OF_TURN_ID
    score = source().score(cut, 1)[1]
    assert score.item() == pytest.approx(by_hand(batch.prompts[1], batch.texts[1], finished=False), abs=1e-6)
    assert score.item() != source().score(batch, 1)[1].item()


def test_the_center_is_subtracted() -> None:
    model = tiny()
    model.config.reward_center = 1.5
    batch = rollout()
    assert torch.allclose(source(model=model).score(batch, 1), source().score(batch, 1) - 1.5, atol=1e-6)


def test_rows_longer_than_the_context_are_unscorable_and_the_others_are_not() -> None:
    batch = rollout()
    lengths = [len(row) for row in source().token_rows(batch)]
    limit = sorted(lengths)[len(lengths) // 2]
    scores = source(model=tiny(max_positions=limit)).score(batch, 1)
    assert scores.isnan().tolist() == [length > limit for length in lengths]
    kept = ~scores.isnan()
    assert torch.allclose(scores[kept], source().score(batch, 1)[kept], atol=1e-6)


def test_scoring_keeps_no_graph_and_uses_no_dropout() -> None:
    model = tiny()
    model.train()
    assert not source(model=model).score(rollout(), 1).requires_grad
    assert not model.training


def test_bfloat16_scores_are_close() -> None:
    batch = rollout()
    exact, low = source().score(batch, 1), source(compute_dtype=torch.bfloat16).score(batch, 1)
    assert low.dtype == torch.float32
    assert 0 < float((low - exact).abs().max()) < 0.1  # 8 bits of mantissa, scores of order 1


def test_a_classifier_without_a_decoder_head_is_scored_through_its_own_forward() -> None:
    settings: dict[str, Any] = dict(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(**settings))
    model.train(False)
    batch = rollout()
    scores = source(model=model, microbatch_tokens=200).score(batch, 1)
    ids = torch.tensor([source().token_rows(batch)[4]])
    with torch.no_grad():
        assert scores[4].item() == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/quickstart-reward/final", "quickstart-reward"), ("my-org/rm", "rm"), ("./final", "final")],
)
def test_scores_are_named_after_the_run_or_the_repository(path: str, name: str) -> None:
    assert short_name(path) == name


def saved(model: Any, folder: Path, tokenizer: Any = TOKENIZER) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_saved_reward_model_scores_as_before(tmp_path: Path) -> None:
    model = tiny()
    model.config.reward_center = 0.25
    path = saved(model, tmp_path / "final")
    loaded = load_reward_model(path, device="cpu")
    batch = rollout()
    assert torch.equal(loaded.score(batch, 1), source(model=model).score(batch, 1))
    assert loaded.name == tmp_path.name
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.filterwarnings("ignore")  # transformers announces the missing head in its own words
def test_a_model_whose_head_would_be_random_is_refused(tmp_path: Path) -> None:
    config = build_config("gemma", layers=1, hidden_size=32, heads=2, vocab_size=len(TOKENIZER))
    language_model = build_causal_lm(config, seed=0)
    with pytest.raises(UserError, match=r"has 2 outputs \(num_labels\), and a reward model has one"):
        load_reward_model(saved(language_model, tmp_path / "lm"), device="cpu")
    language_model.config.num_labels = 1
    with pytest.raises(UserError, match=r"lacks weights \(score.weight\); they would be random"):
        load_reward_model(saved(language_model, tmp_path / "headless"), device="cpu")


def test_two_labels_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.config.num_labels = 2
    model.score = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(UserError, match="has 2 outputs"):
        load_reward_model(saved(model, tmp_path / "pair"), device="cpu")


def test_what_is_not_there_or_lacks_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward.models: path=.*no reward model could be loaded") as info:
        load_reward_model(str(tmp_path / "nothing"), device="cpu")
    assert "\n" not in str(info.value)
    MODEL.save_pretrained(tmp_path / "no-tokenizer")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_reward_model(str(tmp_path / "no-tokenizer"), device="cpu")


def test_missing_scores_are_not_zero() -> None:
    scores = source(model=tiny(max_positions=1)).score(rollout(), 1)
    assert all(math.isnan(value) for value in scores.tolist())
