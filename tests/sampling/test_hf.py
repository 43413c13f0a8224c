"""Completions through ``generate``: what is drawn, what is recorded, and what must have no influence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.models.chat import render_prompt
from rlhf.models.scratch import EOS_ID, STOP_IDS, build_causal_lm, build_config, train_tokenizer
from rlhf.rollout import Prompt, Rollout, Turn
from rlhf.sampling.hf import HFSampler

TEXTS = ["The film is a small wonder and it knows it.", "What is the capital of France? Paris.", "a b c d e f g"]
TOKENIZER = train_tokenizer(TEXTS, 300)
PROMPTS = [
    Prompt(row_id=0, text="The film"),
    Prompt(row_id=1, turns=(Turn(role="user", content="What is the capital of France, and is it a small one?"),)),
    Prompt(row_id=2, text="a"),
    Prompt(row_id=3, text="a small wonder and it knows"),
]


def tiny(family: str = "gemma", **changes: Any) -> Any:
    config = build_config(
        family, layers=2, hidden_size=32, heads=2, vocab_size=len(TOKENIZER), sliding_window=8, **changes
    )
    return build_causal_lm(config, seed=0)


MODEL = tiny()


def sampler(**changes: Any) -> HFSampler:
    settings: dict[str, Any] = {"samples_per_prompt": 4, "max_new_tokens": 12, "stop_ids": STOP_IDS, "seed": 7}
    return HFSampler(tokenizer=TOKENIZER, **{**settings, **changes})


def completions(rollout: Rollout) -> list[list[int]]:
    lengths = rollout.completion_mask.sum(1).tolist()
    return [ids[:length] for ids, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


@torch.no_grad()
def forward_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    """log π_T of each completion token by one forward over the unpadded row."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    chosen: Tensor = (logits.double() / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
    return chosen[:, 0]


def test_rollout_is_ordered_and_complete() -> None:
    rollout = sampler().sample(MODEL, PROMPTS, [8, 3, 5, 6], step=1)
    assert len(rollout) == 16
    assert rollout.group.tolist() == [8] * 4 + [3] * 4 + [5] * 4 + [6] * 4
    assert rollout.sample.tolist() == [0, 1, 2, 3] * 4
    assert [prompt.row_id for prompt in rollout.prompts] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert bool(rollout.valid.all())
    for row in range(16):
        prompt = render_prompt(TOKENIZER, rollout.prompts[row])
        assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == prompt
        assert bool(rollout.prompt_mask[row, -1])  # left-padded
    assert rollout.rollout_logprobs is not None
    assert bool((rollout.rollout_logprobs[~rollout.completion_mask] == 0).all())


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "gemma4"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logprobs_equal_a_full_forward(family: str, temperature: float) -> None:
    model = tiny(family)
    rollout = sampler(temperature=temperature, samples_per_prompt=2).sample(model, PROMPTS, range(4), step=1)
    assert rollout.rollout_logprobs is not None
    for row, completion in enumerate(completions(rollout)):
        exact = forward_logprobs(model, render_prompt(TOKENIZER, rollout.prompts[row]), completion, temperature)
        recorded = rollout.rollout_logprobs[row, : len(completion)].double()
        assert torch.allclose(recorded, exact, atol=1e-5)  # KV cache, padding and float32 together


def test_completions_do_not_depend_on_what_is_decoded_beside_them() -> None:
    slots = [0, 1, 2, 3]
    whole = completions(sampler().sample(MODEL, PROMPTS, slots, step=2))
    for cap in (1, 3, 5):
        assert completions(sampler(microbatch_rows=cap).sample(MODEL, PROMPTS, slots, step=2)) == whole
    turned = completions(sampler().sample(MODEL, PROMPTS[::-1], slots[::-1], step=2))
    assert [row for start in (12, 8, 4, 0) for row in turned[start : start + 4]] == whole
    for slot in slots:  # one prompt alone: no left padding at all
        alone = completions(sampler().sample(MODEL, [PROMPTS[slot]], [slot], step=2))
        assert alone == whole[4 * slot : 4 * slot + 4]
    fewer = completions(sampler(samples_per_prompt=2).sample(MODEL, PROMPTS, slots, step=2))
    assert fewer == [row for start in (0, 4, 8, 12) for row in whole[start : start + 2]]


def test_noise_is_fixed_by_seed_step_slot_and_sample() -> None:
    def drawn(slots: list[int], step: int, **changes: Any) -> list[list[int]]:
        return completions(sampler(**changes).sample(MODEL, PROMPTS[:2], slots, step))

    first = drawn([0, 1], 1)
    assert drawn([0, 1], 1) == first
    assert len({tuple(row) for row in first[:4]}) == 4
    for other in (drawn([0, 1], 2), drawn([5, 6], 1), drawn([0, 1], 1, seed=8)):
        assert not {tuple(row) for row in other} & {tuple(row) for row in first}


def test_first_tokens_have_the_models_probabilities() -> None:
    many = sampler(samples_per_prompt=3000, max_new_tokens=1, temperature=0.7, microbatch_rows=4096)
    tokens = many.sample(MODEL, PROMPTS[:1], [0], step=1).completion_ids[:, 0]
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([render_prompt(TOKENIZER, PROMPTS[0])])).logits[0, -1]
    expected = (logits.double() / 0.7).softmax(-1) * 3000
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    common = expected >= 5
    seen, due = (torch.cat([part[common], part[~common].sum()[None]]) for part in (counts, expected))
    freedom = len(due) - 1
    assert freedom > 20
    assert abs(float(((seen - due).square() / due).sum()) - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_nothing_of_the_checkpoints_generation_config_acts() -> None:
    plain = sampler().sample(MODEL, PROMPTS, range(4), step=3)
    model = tiny()
    own = model.generation_config
    own.top_k, own.top_p, own.temperature, own.repetition_penalty, own.do_sample = 5, 0.5, 0.3, 1.7, True
    own.suppress_tokens = list(range(40, len(TOKENIZER)))
    own.forced_eos_token_id, own.min_new_tokens, own.no_repeat_ngram_size = EOS_ID, 6, 2
    with pytest.warns(UserWarning, match=r"top_k=5.*top_p=0.5.*not applied") as caught:
        rollout = sampler().sample(model, PROMPTS, range(4), step=3)
    assert "suppress_tokens" in str(caught[0].message)
    assert completions(rollout) == completions(plain)
    assert rollout.rollout_logprobs is not None and plain.rollout_logprobs is not None
    assert torch.equal(rollout.rollout_logprobs, plain.rollout_logprobs)
    assert model.generation_config is own  # put back, unchanged
    assert own.top_k == 5


def scripted(model: Any, tokens: list[int]) -> Any:
    """The model with logits that force ``tokens`` one after another, whatever the prompt."""
    state = {"at": 0}

    def force(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        forced = torch.full_like(output, -1e4)
        forced[..., tokens[state["at"]]] = 0.0
        state["at"] = (state["at"] + 1) % len(tokens)
        return forced

    model.lm_head.register_forward_hook(force)
    return model


@pytest.mark.parametrize("stop", STOP_IDS)
def test_every_stop_id_ends_a_completion_and_counts_as_part_of_it(stop: int) -> None:
    script = [40, 41, stop, 42, 43, 44]
    rollout = sampler(max_new_tokens=6, samples_per_prompt=2).sample(scripted(tiny(), script), PROMPTS[:1], [0], 1)
    assert completions(rollout) == [[40, 41, stop]] * 2
    assert rollout.finished.tolist() == [True, True]
    assert rollout.texts[0] == TOKENIZER.decode([40, 41])


def test_rows_that_stop_at_different_places_are_cut_where_they_stopped() -> None:
    rollout = sampler(samples_per_prompt=64, max_new_tokens=20).sample(MODEL, PROMPTS, range(4), step=1)
    assert 10 < int(rollout.finished.sum()) < 200
    for completion, finished in zip(completions(rollout), rollout.finished.tolist(), strict=True):
        stops = [place for place, token in enumerate(completion) if token in STOP_IDS]
        assert stops == ([len(completion) - 1] if finished else [])
        assert finished or len(completion) == 20


def test_an_ordinary_token_as_stop_id_is_not_part_of_the_text() -> None:
    script = [*script_of("wonder"), *script_of("!"), 40]
    stop = script_of("!")[0]
    rollout = sampler(stop_ids=(stop,), max_new_tokens=len(script)).sample(
        scripted(tiny(), script), PROMPTS[:1], [0], 1
    )
    assert completions(rollout)[0] == script[:-1]
    assert rollout.texts[0] == "wonder"


def test_running_out_of_tokens_is_not_finishing_and_stopping_at_the_last_token_is() -> None:
    short = sampler(max_new_tokens=2).sample(scripted(tiny(), [40, 41]), PROMPTS[:1], [0], 1)
    assert not bool(short.finished.any())
    assert completions(short) == [[40, 41]] * 4
    exact = sampler(max_new_tokens=3).sample(scripted(tiny(), [40, 41, EOS_ID]), PROMPTS[:1], [0], 1)
    assert bool(exact.finished.all())


def test_pad_tokens_inside_a_completion_are_tokens() -> None:
    """Id 0 is what rows are padded with, and a model may say it: lengths come from where rows stopped."""
    rollout = sampler(max_new_tokens=5).sample(scripted(tiny(), [40, 0, 0, 41, EOS_ID]), PROMPTS[:1], [0], 1)
    assert completions(rollout)[0] == [40, 0, 0, 41, EOS_ID]


def test_pad_token_equal_to_eos_confuses_nothing() -> None:
    plain = sampler().sample(MODEL, PROMPTS, range(4), step=1)
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny()
    model.config.pad_token_id = model.generation_config.pad_token_id = EOS_ID
    rollout = HFSampler(tokenizer=tokenizer, samples_per_prompt=4, max_new_tokens=12, stop_ids=STOP_IDS, seed=7).sample(
        model, PROMPTS, range(4), step=1
    )
    assert completions(rollout) == completions(plain)
    assert rollout.finished.tolist() == plain.finished.tolist()


def script_of(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER.encode(text, add_special_tokens=False)]


def test_a_stop_string_ends_the_completion_with_the_token_that_completes_it() -> None:
    script = [*script_of("wonder"), *script_of("\nQ:"), *script_of(" and more")]
    stops = sampler(stop=("\nQ:", "never"), max_new_tokens=len(script))
    rollout = stops.sample(scripted(tiny(), script), PROMPTS[:1], [0], 1)
    assert completions(rollout)[0] == script[: len(script_of("wonder")) + len(script_of("\nQ:"))]
    assert bool(rollout.finished.all())
    assert rollout.texts[0] == "wonder"


def test_a_stop_string_begun_in_the_prompt_does_not_count() -> None:
    prompt = Prompt(row_id=0, text="a\nQ")
    rollout = sampler(stop=("\nQ:",), max_new_tokens=2).sample(scripted(tiny(), script_of(":a")[:2]), [prompt], [0], 1)
    assert not bool(rollout.finished.any())


def test_without_stop_ids_every_row_runs_to_the_end() -> None:
    rollout = sampler(stop_ids=(), max_new_tokens=4).sample(scripted(tiny(), [40, EOS_ID, 41, 42]), PROMPTS[:1], [0], 1)
    assert completions(rollout)[0] == [40, EOS_ID, 41, 42]
    assert not bool(rollout.finished.any())


def test_greedy_takes_the_arg_max_and_one_row_per_prompt() -> None:
    rollout = sampler(max_new_tokens=4).greedy(MODEL, PROMPTS, [4, 5, 6, 7], step=9)
    assert rollout.group.tolist() == [4, 5, 6, 7]
    assert rollout.rollout_logprobs is not None
    for row, completion in enumerate(completions(rollout)):
        ids = render_prompt(TOKENIZER, PROMPTS[row])
        for token in completion:
            with torch.no_grad():
                assert int(MODEL(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids = [*ids, token]
        exact = forward_logprobs(MODEL, render_prompt(TOKENIZER, PROMPTS[row]), completion)
        assert torch.allclose(rollout.rollout_logprobs[row, : len(completion)].double(), exact, atol=1e-5)


def test_the_model_is_left_as_it_was_and_no_random_state_is_used() -> None:
    model = tiny().train()
    model.model.layers[0].eval()  # a frozen part
    model.config.use_cache = False  # as set for training
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    rollout = sampler().sample(model, PROMPTS, range(4), step=1)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert torch.equal(before, torch.get_rng_state())
    assert rollout.rollout_logprobs is not None
    assert not rollout.rollout_logprobs.requires_grad
    assert completions(rollout) == completions(sampler().sample(MODEL, PROMPTS, range(4), step=1))


def test_dropout_is_off_while_decoding() -> None:
    model = tiny()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert completions(sampler().sample(model, PROMPTS, range(4), 1)) == completions(
        sampler().sample(MODEL, PROMPTS, range(4), 1)
    )


def test_everything_is_put_back_when_decoding_fails() -> None:
    model = tiny().train()
    own = model.generation_config

    def fail(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("out of memory")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler().sample(model, PROMPTS, range(4), step=1)
    assert model.training
    assert model.generation_config is own


def test_gather_surrounds_decoding_and_gets_the_model() -> None:
    seen: list[object] = []

    @contextmanager
    def gather(model: nn.Module) -> Iterator[None]:
        seen.append(model)
        yield
        seen.append("released")

    sampler(gather=gather).sample(MODEL, PROMPTS[:1], [0], step=1)
    assert seen == [MODEL, "released"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads an old name
def test_an_adapter_takes_part_in_sampling() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    base = completions(sampler().sample(MODEL, PROMPTS, range(4), step=1))
    assert completions(sampler().sample(model, PROMPTS, range(4), step=1)) == base  # B = 0: the identity
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    rollout = sampler().sample(model, PROMPTS, range(4), step=1)
    assert completions(rollout) != base
    assert rollout.rollout_logprobs is not None
    exact = forward_logprobs(model, render_prompt(TOKENIZER, PROMPTS[0]), completions(rollout)[0])
    assert torch.allclose(rollout.rollout_logprobs[0, : len(exact)].double(), exact, atol=1e-5)


def test_bfloat16_decoding_records_the_distribution_it_drew_from() -> None:
    rollout = sampler(compute_dtype=torch.bfloat16).sample(MODEL, PROMPTS, range(4), step=1)
    assert rollout.rollout_logprobs is not None
    assert rollout.rollout_logprobs.dtype == torch.float32
    completion = completions(rollout)[0]
    exact = forward_logprobs(MODEL, render_prompt(TOKENIZER, PROMPTS[0]), completion)
    gap = (rollout.rollout_logprobs[0, : len(completion)].double() - exact).abs().max()
    assert 0 < float(gap) < 0.2  # bfloat16 has 8 bits, logits are of order 1


def test_sampling_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(stop=("\nQ:",)).sample(MODEL, PROMPTS, range(4), step=1)
