"""The decode loop draws what ``generate`` draws, whatever waits, enters and leaves meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models import masks
from rlhf.models.chat import render_prompt
from rlhf.models.scratch import STOP_IDS, build_causal_lm, build_config
from rlhf.rollout import Group, Prompt, Rollout
from rlhf.sampling.loop import DecodeLoop
from rlhf.sampling.slots import Captured, Slots
from tests.sampling.test_hf import PROMPTS, TOKENIZER, completions, sampler, tiny

STOPS = (*STOP_IDS, *range(20, 45))  # a random model would hardly ever stop: here every tenth token does
MANY = [Prompt(row_id=index, text="a b c d e f g a small wonder"[: 1 + 2 * index]) for index in range(12)]


def both(family: str, prompts: list[Prompt] = MANY, greedy: bool = False, **settings: Any) -> tuple[Rollout, Rollout]:
    model, slots = tiny(family), range(len(prompts))
    plain = sampler(plain=True, stop_ids=STOPS, max_new_tokens=24)
    fast = sampler(stop_ids=STOPS, max_new_tokens=24, **settings)
    if greedy:
        return plain.greedy(model, prompts, slots, 1), fast.greedy(model, prompts, slots, 1)
    return plain.sample(model, prompts, slots, 1), fast.sample(model, prompts, slots, 1)


def assert_equal(plain: Rollout, fast: Rollout) -> None:
    assert completions(fast) == completions(plain)
    assert fast.finished.tolist() == plain.finished.tolist() and fast.texts == plain.texts
    assert plain.rollout_logprobs is not None and fast.rollout_logprobs is not None
    torch.testing.assert_close(fast.rollout_logprobs, plain.rollout_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("rows", [1, 5, 17, 10_000])
def test_the_same_completions_however_few_fit_at_once(family: str, rows: int) -> None:
    """5 or 17 of 48 rows: they wait, enter when others leave, and are read in parts. Windows are 8 tokens wide."""
    config = tiny(family).config.get_text_config()
    width = max(len(render_prompt(TOKENIZER, prompt)) for prompt in MANY) + 24
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width * 4
    assert_equal(*both(family, kv_bytes=rows * slot))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_the_same_greedy_completions(family: str) -> None:
    assert_equal(*both(family, PROMPTS, greedy=True))


def test_rows_stop_at_many_places() -> None:
    """Or the tests above would compare less than they seem to."""
    lengths = both("gemma")[1].completion_mask.sum(1).tolist()
    assert len(set(lengths)) > 8 and 1 in lengths and 24 in lengths


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kernels(attention: str) -> None:
    model = tiny("gemma3")
    model.config._attn_implementation = attention
    settings: dict[str, Any] = {"stop_ids": STOPS, "max_new_tokens": 24}
    found = [sampler(plain=plain, **settings).sample(model, MANY, range(12), 1) for plain in (True, False)]
    assert_equal(*found)


@pytest.mark.parametrize("plain", [False, True])
def test_it_tells_of_every_prompt_once_and_of_some_before_others(plain: bool) -> None:
    told: list[Group] = []
    settings: dict[str, Any] = {"stop_ids": STOPS, "max_new_tokens": 24, "plain": plain, "microbatch_rows": 5}
    draw = sampler(ended=lambda group, step: told.append(group), **settings)
    found = draw.sample(tiny(), MANY, range(7, 19), 1)
    assert sorted(told) == list(found.groups()) and len(told) == 12
    assert plain or [group.slot for group in told] != list(range(7, 19))
    draw.greedy(tiny(), MANY, range(12), 1)
    assert len(told) == 12


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("gemma", "eager"), ("gemma", "sdpa"), ("gemma2", "eager"), ("gemma3", "eager"), ("gemma3", "sdpa")],
)
def test_query_heads_that_share_a_key_head(family: str, key_heads: int, attention: str) -> None:
    """4 query heads, in groups of 4 or 2, also with Gemma 2's bounded scores, which sdpa has no means for."""
    sizes: dict[str, Any] = {"layers": 2, "hidden_size": 32, "vocab_size": len(TOKENIZER), "sliding_window": 8}
    config = build_config(family, heads=4, kv_heads=key_heads, **sizes)
    config._attn_implementation = attention
    model = build_causal_lm(config, seed=0)
    if family == "gemma2":
        config.attn_logit_softcapping = 0.5  # bounds what a tiny model scores, too
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.5
    settings: dict[str, Any] = {"stop_ids": STOPS, "max_new_tokens": 24}
    found = [sampler(plain=plain, **settings).sample(model, MANY, range(12), 1) for plain in (True, False)]
    assert_equal(*found)
    assert config._attn_implementation == attention


@pytest.mark.parametrize(("name", "softcap"), [("sdpa", None), ("eager", None), ("eager", 0.7)])
def test_packed_attention_by_repeating_keys(name: str, softcap: float | None) -> None:
    """3 rows, 6 query heads on 2 key heads, 5 columns of which the first row sees two."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, 4, generator=generator) for heads, length in ((6, 1), (2, 5), (2, 5))
    )
    allowed = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    added = torch.zeros(3, 1, 1, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.repeat_interleave(3, 1)
    attend = ALL_ATTENTION_FUNCTIONS[f"rlhf_{name}_one_token"]
    mask = allowed if name == "sdpa" else added
    found, _ = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-6)  # sums in another order


def test_a_prompt_is_read_once_for_all_its_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    prefill = DecodeLoop._prefill

    def counting(self: DecodeLoop, prompts: Any, lengths: Tensor) -> Any:
        read.extend(map(len, prompts))
        return prefill(self, prompts, lengths)

    monkeypatch.setattr(DecodeLoop, "_prefill", counting)
    sampler(samples_per_prompt=8).sample(tiny(), PROMPTS, range(4), 1)
    assert sorted(read) == sorted(len(render_prompt(TOKENIZER, prompt)) for prompt in PROMPTS)


def test_prompts_are_read_within_the_token_budget() -> None:
    machine = DecodeLoop(tiny(), 4, torch.tensor([1]), lambda *_: (torch.zeros(0), torch.zeros(0)), prefill_tokens=10)
    prompts = [[5] * 2, [5] * 3, [5] * 4, [5] * 12]
    parts = machine._batch([0, 1, 2, 3, 4], prompts, [0, 0, 1, 2, 3])
    assert parts == [[0, 1, 2], [3], [4]]  # 2 × 3 tokens; 3 × 4 would be 12; one longer than the budget goes alone


def test_families_that_it_does_not_know_are_left_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not masks.known(tiny("gemma4")) and masks.known(tiny("gemma3"))
    monkeypatch.setattr(DecodeLoop, "run", lambda *_: pytest.fail("not for this model"))
    sampler().sample(tiny("gemma4"), PROMPTS, range(4), 1)
    sampler(stop=("zz",)).sample(tiny(), PROMPTS, range(4), 1)  # stop strings are generate's to find


# --- slots by hand ---------------------------------------------------------------------------------------------------


def filled() -> Slots:
    """Four rows of one layer; row i holds the value i in its first columns, 1 to 4 of them."""
    slots, captured = Slots(6, 5, torch.device("cpu")), Captured()
    prompts = torch.arange(4.0)[:, None, None, None].expand(4, 1, 4, 1)
    captured.update(prompts, -prompts, 0)
    slots.admit(captured, torch.arange(4), torch.arange(1, 5))
    return slots


def values(slots: Slots, row: int) -> list[float]:
    keys: list[float] = slots.layers[0][0][row, 0, : int(slots.lengths[row]), 0].tolist()
    return keys


def test_a_step_writes_behind_each_row() -> None:
    slots = filled()
    columns, used = slots.open()
    assert columns.tolist() == [1, 2, 3, 4] and used == 5
    keys, _ = slots.update(torch.full((4, 1, 1, 1), 9.0), torch.zeros(4, 1, 1, 1), 0)
    slots.close()
    assert keys.shape == (4, 1, 5, 1) and [values(slots, row) for row in (0, 3)] == [[0, 9], [3, 3, 3, 3, 9]]


def test_rows_that_leave_are_overwritten_by_the_last() -> None:
    slots = filled()
    assert slots.release(torch.tensor([True, False, True, False])).tolist() == [3, 1]
    assert slots.rows == 2 and [values(slots, row) for row in range(2)] == [[3] * 4, [1] * 2]
    assert slots.release(torch.tensor([False, False])).tolist() == [0, 1]
    assert slots.release(torch.tensor([True, True])).tolist() == [] and slots.rows == 0


def test_rows_enter_behind_those_in_use() -> None:
    slots, captured = filled(), Captured()
    captured.update(torch.full((1, 1, 2, 1), 7.0), torch.zeros(1, 1, 2, 1), 0)
    slots.admit(captured, torch.tensor([0, 0]), torch.tensor([2, 2]))
    assert slots.rows == 6 and values(slots, 5) == [7, 7] and values(slots, 1) == [1, 1]
