"""LoRA: one copy of the weights plays policy and reference, only the adapter moves, and it survives save and resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models.layout import plain_rows
from rlhf.models.load import LoraSpec, add_lora, export, load_causal_lm
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import AdapterOffReference, FrozenReference, Reference
from rlhf.models.scratch import END_OF_TURN_ID, EOS_ID, build_causal_lm, build_config, train_tokenizer
from rlhf.objectives.reinforce import Reinforce
from rlhf.rollout import Prompt, Rollout, TokenBatch
from rlhf.runtime import microbatches, training_state
from rlhf.runtime.checkpoint import load_checkpoint, save_checkpoint
from rlhf.runtime.updater import PolicyForward, Term, Updater, UpdateReport
from rlhf.sampling.hf import HFSampler
from tests.support import alone, fixed_rollout, prepared, updater

# peft asks transformers 5 for an attribute by its old name while it wraps a model
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENIZER = train_tokenizer(["The film is a small wonder and it knows it.", "a b c d e f g"], 300)
SPEC = LoraSpec(r=4, alpha=8.0)
PLAIN = StatsRequest()
K1, EXACT = Reinforce(beta=0.3), Reinforce(beta=0.3, estimator="exact")
BOTH = pytest.mark.parametrize("objective", [K1, EXACT], ids=["k1", "exact"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Gemma: what ``policy.path`` names."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    config = build_config("gemma", layers=2, hidden_size=32, heads=2, vocab_size=300)
    export(build_causal_lm(config, seed=0), TOKENIZER, folder, stop_ids=(EOS_ID, END_OF_TURN_ID), card="")
    return str(folder)


def adapted(base: str, seed: int = 3, moved: bool = True) -> ScoredModel:
    """The policy of a LoRA run. ``moved``: B is no longer 0, so that policy and reference differ."""
    lm = add_lora(load_causal_lm(base), SPEC, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if moved and "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ScoredModel(lm)


def adapter_off(model: ScoredModel) -> AdapterOffReference:
    return AdapterOffReference(model, model)


def logprobs(model: ScoredModel, batch: TokenBatch) -> Tensor:
    return token_stats(model, plain_rows(batch), PLAIN).logprobs.detach()


def compared(rollout: Rollout, reference: Reference) -> Rollout:
    """With log π_ref, from the microbatches that the update will make."""
    found = microbatches.score(rollout, lambda batch: reference.stats(plain_rows(batch), PLAIN), budget_tokens=100)
    return replace(rollout, ref_logprobs=found.logprobs, rollout_logprobs=found.logprobs)


def update(
    model: ScoredModel, reference: Reference, objective: Reinforce, rollout: Rollout | None = None
) -> UpdateReport:
    """One step of plain SGD with learning rate 1: the weights change by minus the gradient."""
    batch = prepared(compared(rollout or fixed_rollout(), reference), objective)
    return updater(model, cast(FrozenReference, reference)).step([Term(objective=objective, batch=batch)], 1)


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def named(model: torch.nn.Module, part: str) -> set[str]:
    return {name for name in model.state_dict() if part in name}


# --- the reference ---------------------------------------------------------------------------------------------------


def test_the_adapter_switched_off_is_the_base_model_to_the_last_bit(base: str) -> None:
    model, plain, rollout = adapted(base), ScoredModel(load_causal_lm(base)), fixed_rollout()
    expected = logprobs(plain, rollout)
    reference = adapter_off(model)
    assert torch.equal(reference.stats(plain_rows(rollout), PLAIN).logprobs, expected)
    states = reference.states(plain_rows(rollout))
    own = FrozenReference(plain).states(plain_rows(rollout))
    assert torch.equal(states.hidden, own.hidden) and torch.equal(states.head.weight, own.head.weight)
    assert not states.hidden.requires_grad
    # The adapter that was off does something, and it is on again.
    assert float((logprobs(model, rollout) - expected).abs().max()) > 1e-2


def test_asking_the_reference_leaves_the_policy_as_it_was(base: str) -> None:
    """Also what is trained: switching layers off must not freeze their adapters for good."""
    model, rollout = adapted(base), fixed_rollout()
    before, trained = logprobs(model, rollout), {n for n, p in model.named_parameters() if p.requires_grad}
    adapter_off(model).stats(plain_rows(rollout), PLAIN)
    adapter_off(model).states(plain_rows(rollout))
    assert torch.equal(logprobs(model, rollout), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained == named(model, "lora_")


@BOTH
def test_kl_is_exactly_zero_before_the_first_update(base: str, objective: Reinforce) -> None:
    """B = 0: the adapter adds exact zeros, so policy and reference agree to the last bit."""
    model = adapted(base, moved=False)
    reference = adapter_off(model)
    known = compared(fixed_rollout(), reference).ref_logprobs
    (stats,) = update(model, reference, objective).stats
    found = stats.ref_logprobs if objective is EXACT else known
    assert found is not None and torch.equal(stats.logprobs, found)
    assert objective is K1 or (stats.kl is not None and bool((stats.kl == 0).all()))


def test_adapters_are_a_pure_function_of_the_seed(base: str) -> None:
    torch.manual_seed(5)
    first, drawn = tensors(adapted(base, moved=False)), torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(()))  # the global generator was not touched
    assert changed(adapted(base, moved=False), first) == set()
    other = adapted(base, seed=4, moved=False)
    assert changed(other, first) == named(other, "lora_A")  # B is 0 whatever the seed


# --- the update ------------------------------------------------------------------------------------------------------


@BOTH
def test_only_the_adapter_learns(base: str, objective: Reinforce) -> None:
    """The first step moves B alone (∂/∂A is a multiple of B = 0), the second everything; the base never moves."""
    model = adapted(base, moved=False)
    before = tensors(model)
    assert update(model, adapter_off(model), objective).applied
    assert changed(model, before) == named(model, "lora_B")
    assert update(model, adapter_off(model), objective).applied
    assert changed(model, before) == named(model, "lora_")
    assert len(named(model, "lora_")) == 2 * 2 * 7  # A and B, two layers, q k v o gate up down: not the head


@BOTH
def test_the_gradient_is_that_of_a_separate_frozen_copy(base: str, objective: Reinforce) -> None:
    changes = []
    for shared in (True, False):
        model = adapted(base)
        reference = adapter_off(model) if shared else FrozenReference(ScoredModel(load_causal_lm(base)))
        before = tensors(model)
        report = update(model, reference, objective)
        assert report.applied and report.grad_norm > 1e-2
        changes.append(torch.cat([(value - before[n]).flatten() for n, value in model.state_dict().items()]))
    one, other = changes
    assert float((one - other).norm() / other.norm()) <= 1e-6  # fp32; equal to the last bit in every run so far


@BOTH
def test_the_penalty_is_in_that_gradient(base: str, objective: Reinforce) -> None:
    """Equal rewards: what is left is the KL term, and it is not small. Else the test above would compare nothing."""
    model = adapted(base)
    report = update(model, adapter_off(model), objective, fixed_rollout(rewards=torch.ones(16)))
    assert report.grad_norm > 1e-2


def test_with_a_reference_of_its_own_the_adapter_stays_on(base: str) -> None:
    """``reference.path`` beside ``policy.lora``: another checkpoint, here one whose weights are 1 % larger."""
    other = load_causal_lm(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    model = adapted(base, moved=False)
    (stats,) = update(model, FrozenReference(ScoredModel(other)), EXACT).stats
    assert stats.kl is not None and float(stats.kl.max()) > 1e-6


# --- sampling --------------------------------------------------------------------------------------------------------


def sampled(lm: torch.nn.Module) -> Rollout:
    sampler = HFSampler(tokenizer=TOKENIZER, samples_per_prompt=4, max_new_tokens=10, stop_ids=(EOS_ID,), seed=3)
    prompts = [Prompt(row_id=0, text="The film"), Prompt(row_id=1, text="a b c d")]
    return sampler.sample(lm, prompts, [0, 1], step=1)


def test_completions_come_from_the_adapted_policy(base: str) -> None:
    model = adapted(base)
    rollout = sampled(model.causal_lm)
    assert rollout.rollout_logprobs is not None
    # fp32: the cache changes the shapes of matrix products, as in tests/models/test_families.py
    assert float((logprobs(model, rollout) - rollout.rollout_logprobs).abs().max()) <= 1e-5
    reference = adapter_off(model).stats(plain_rows(rollout), PLAIN).logprobs
    assert float((reference - rollout.rollout_logprobs).abs().max()) > 1e-2


def test_a_merged_adapter_says_the_same(base: str) -> None:
    model = adapted(base)
    merged = cast(Any, copy.deepcopy(model.causal_lm)).merge_and_unload()
    rollout, again = sampled(model.causal_lm), sampled(merged)
    assert torch.equal(rollout.completion_ids, again.completion_ids)
    assert rollout.texts != sampled(load_causal_lm(base)).texts
    # W·x + s·B·A·x against (W + s·B·A)·x in fp32
    assert float((logprobs(model, rollout) - logprobs(ScoredModel(merged), rollout)).abs().max()) <= 2e-5


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_exported_folder_is_the_adapter_and_loads_as_the_policy(base: str, tmp_path: Path) -> None:
    """transformers reads the base model named in adapter_config.json and puts the adapter on it."""
    model, folder = adapted(base), tmp_path / "final"
    update(model, adapter_off(model), K1)
    export(model.causal_lm, TOKENIZER, folder, stop_ids=(EOS_ID, END_OF_TURN_ID), card="# A policy\n")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names  # the base is named, not copied
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (folder / "README.md").read_text() == "# A policy\n"
    loaded = ScoredModel(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logprobs(loaded, fixed_rollout()), logprobs(model, fixed_rollout()))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == TOKENIZER.get_vocab()


def adam(model: ScoredModel) -> Updater:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = PolicyForward(adapter_off(model))
    return Updater(alone(), model, torch.optim.AdamW(trained, lr=1e-2), lambda step: 1e-2, forward, 100, None)


def learn(model: ScoredModel, with_updater: Updater, first: int, last: int) -> None:
    for step in range(first, last + 1):
        batch = prepared(compared(fixed_rollout(seed=step), adapter_off(model)), K1)
        assert with_updater.step([Term(objective=K1, batch=batch)], step).applied


def test_a_resumed_run_is_the_run_that_was_never_stopped(base: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two steps; and the last two again in a model whose adapter started elsewhere."""
    model = adapted(base, moved=False)
    trainer = adam(model)
    learn(model, trainer, 1, 2)
    content = training_state.collect(alone(), model, trainer.optimizer)
    path = save_checkpoint(tmp_path, 2, content, {}, keep=1)
    learn(model, trainer, 3, 4)
    # The adapter and its moments are in it, and nothing of the base
    assert set(content["model"]) == named(model, "lora_")
    assert len(content["optimizer"]) == 2 * len(content["model"]) + 1  # and the step
    again = adapted(base, seed=8)
    resumed = adam(again)
    training_state.restore(alone(), again, resumed.optimizer, load_checkpoint(path).files)
    learn(again, resumed, 3, 4)
    assert changed(again, tensors(model)) == set()


def test_another_models_checkpoint_is_refused(base: str) -> None:
    """All weights for an adapter, an adapter for all weights, and an adapter with one weight too many."""
    full, lora = ScoredModel(load_causal_lm(base)), adapted(base)
    whole, trainer = torch.optim.AdamW(full.parameters()), adam(lora)
    of_full = training_state.collect(alone(), full, whole)
    of_lora = training_state.collect(alone(), lora, trainer.optimizer)
    stray = {**of_lora, "model": {**of_lora["model"], "stray": torch.zeros(1)}}
    for model, optimizer, content in (
        (lora, trainer.optimizer, of_full),
        (full, whole, of_lora),
        (lora, trainer.optimizer, stray),
    ):
        with pytest.raises(UserError, match="not this model's"):
            training_state.restore(alone(), model, optimizer, content)


def test_an_adapter_folder_is_an_input_from_anywhere(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative base path is made absolute, the stop ids travel along, and all merged weights can be trained on."""
    monkeypatch.chdir(Path(base).parent)
    trained = adapted("base")
    rollout = fixed_rollout()
    known = logprobs(trained, rollout)
    export(trained.causal_lm, TOKENIZER, tmp_path / "final", stop_ids=(EOS_ID, END_OF_TURN_ID), card="")
    monkeypatch.chdir("/")
    again: Any = load_causal_lm(str(tmp_path / "final"))
    assert again.generation_config.eos_token_id == [EOS_ID, END_OF_TURN_ID]
    assert all(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(logprobs(ScoredModel(again), rollout), known, atol=1e-5, rtol=0)  # W + BA, rounded once


# peft's own warning about what is refused here
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_the_head_is_refused(base: str) -> None:
    """``ChunkedHead`` reads the head's weight and would leave its adapter out without a word."""
    with pytest.raises(UserError, match="output head"):
        ScoredModel(add_lora(load_causal_lm(base), LoraSpec(r=4, alpha=8.0, targets=["q_proj", "lm_head"]), 0))


def test_targets_that_are_no_layers_are_refused_by_name(base: str) -> None:
    with pytest.raises(UserError, match=r"policy\.lora\.targets=\['no_such_module'\]"):
        add_lora(load_causal_lm(base), LoraSpec(r=4, alpha=8.0, targets=["no_such_module"]), 0)


def test_a_checkpoint_of_another_rank_is_refused(base: str) -> None:
    """A rank-1 adapter would broadcast into one of rank 4."""
    model = adapted(base)
    trainer = adam(model)
    content = training_state.collect(alone(), model, trainer.optimizer)
    thin = {name: value[:1] if "lora_A" in name else value for name, value in content["model"].items()}
    with pytest.raises(UserError, match=r"lora_A.*is \(1, 32\), and this model's is \(4, 32\)"):
        training_state.restore(alone(), model, trainer.optimizer, {**content, "model": thin})
