"""vLLM itself, on this processor. `make test-vllm` installs and runs it; elsewhere it is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.policy import ScoredModel
from rlhf.models.scratch import STOP_IDS, build_causal_lm, build_config
from rlhf.sampling.engine import Engine, EngineSampler
from rlhf.sampling.hf import HFSampler
from rlhf.sampling.vllm import InProcess, Start
from tests.sampling.test_hf import PROMPTS, TOKENIZER
from tests.vllm.runs import learned, prepare

pytest.importorskip("vllm")
SLOTS = [0, 1, 2, 3]
AT = 0.7


def policy(seed: int) -> Any:
    config = build_config("gemma", layers=2, hidden_size=64, heads=2, vocab_size=len(TOKENIZER))
    lm = build_causal_lm(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "layers" in name:  # they outweigh the embedding, or every text would repeat its last token
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return ScoredModel(lm).causal_lm


@pytest.fixture(scope="module")
def engine() -> InProcess:
    return InProcess(start=Start(tokens=96, dtype=torch.float32, kv_bytes=2**30), tokenizer=TOKENIZER)


SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": AT, "stop_ids": STOP_IDS, "seed": 7}


def sampler(engine: Engine, k: int = 4, **changes: Any) -> EngineSampler:
    return EngineSampler(engine=engine, tokenizer=TOKENIZER, samples_per_prompt=k, **{**SETTINGS, **changes})


def plain(**changes: Any) -> HFSampler:
    return HFSampler(tokenizer=TOKENIZER, samples_per_prompt=4, **{**SETTINGS, **changes})


def test_after_an_update_its_greedy_text_is_ours(engine: InProcess) -> None:
    assert_greedy_text_is_ours(engine)


def assert_greedy_text_is_ours(engine: Engine) -> None:
    """Of the same prompts each time: keys and values of the old weights must be forgotten."""
    texts = set()
    for seed in (0, 1, 0):
        lm = policy(seed)
        ours = plain().greedy(lm, PROMPTS, SLOTS, 1)
        theirs = sampler(engine).greedy(lm, PROMPTS, SLOTS, 1)
        assert theirs.completion_ids.tolist() == ours.completion_ids.tolist()
        assert theirs.finished.tolist() == ours.finished.tolist()
        assert theirs.texts == ours.texts
        texts.add(theirs.texts)
    assert len(texts) == 2


def test_its_logprobs_are_the_policys_at_the_temperature(engine: InProcess) -> None:
    from rlhf.interfaces import StatsRequest
    from rlhf.models.layout import plain_rows
    from rlhf.models.policy import token_stats

    lm = policy(2)
    found = sampler(engine).sample(lm, PROMPTS, SLOTS, 1)
    with torch.no_grad():
        own = token_stats(ScoredModel(lm), plain_rows(found), StatsRequest(temperature=AT)).logprobs
    assert found.rollout_logprobs is not None
    torch.testing.assert_close(found.rollout_logprobs, own, rtol=0, atol=1e-4)  # fp32 sums of 64 in another order


def test_a_stop_string_ends_a_completion_where_ours_does(engine: InProcess) -> None:
    lm = policy(0)
    string = plain().greedy(lm, PROMPTS, SLOTS, 1).texts[0][3:5]
    ours = plain(stop=(string,)).greedy(lm, PROMPTS, SLOTS, 1)
    theirs = sampler(engine, stop=(string,)).greedy(lm, PROMPTS, SLOTS, 1)
    assert bool(ours.finished[0]) and theirs.completion_ids.tolist() == ours.completion_ids.tolist()
    assert theirs.texts == ours.texts and theirs.finished.tolist() == ours.finished.tolist()


def test_a_row_is_drawn_the_same_whatever_is_decoded_beside_it(engine: InProcess) -> None:
    lm = policy(2)
    together = sampler(engine).sample(lm, PROMPTS, SLOTS, 3)
    alone = sampler(engine).sample(lm, PROMPTS[2:3], [2], 3)
    assert together.texts[8:12] == alone.texts
    assert len(set(sampler(engine).sample(lm, PROMPTS, SLOTS, 4).texts) & set(together.texts)) < 8


def test_frequencies_are_those_of_the_policy(engine: InProcess) -> None:
    """First tokens of 2,000 completions: total variation from π_T within what 2,000 draws leave (mean .5·√(V/n))."""
    lm = policy(3)
    found = sampler(engine, k=2000).sample(lm, PROMPTS[:1], [0], 1)
    with torch.no_grad():
        logits = lm(input_ids=found.prompt_ids[:1], logits_to_keep=1).logits[0, -1]
    expected = (logits.double() / AT).softmax(-1)
    drawn = torch.bincount(found.completion_ids[:, 0], minlength=len(expected)).double() / 2000
    spread = (expected * (1 - expected) / 2000).sqrt().sum() / 2  # bounds the mean of the distance
    assert float((drawn - expected).abs().sum() / 2) < 1.2 * float(spread)


def test_five_steps_learn_like_those_of_our_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    hf, vllm = learned(tmp_path / "hf"), learned(tmp_path / "vllm", "rollout.engine=vllm")
    assert vllm.gap < 1e-4  # nats a token, fp32
    assert hf.gain > 0.1 and vllm.gain > 0.1
    assert abs(hf.gain - vllm.gain) < 0.5 * hf.gain  # other random numbers: the same size, not the same figure
