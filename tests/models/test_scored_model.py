"""The scored model against plain full logits: one unpadded row at a time through a causal LM nobody has touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.head import ChunkedHead, PositionStats, ReferenceStates
from rlhf.models.layout import SharedPrompts, plain_rows
from rlhf.models.load import keep_activations
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import build_causal_lm, build_config
from rlhf.rollout import TokenBatch
from tests.support import tiny_lm

VOCAB = 50
EVERYTHING = StatsRequest(entropy=True, score_norms=True, reference=True)
THREE_POSITIONS = 3 * 4 * VOCAB  # chunk_bytes that hold three positions of fp32 logits


def language_model(family: str = "gemma", seed: int = 0, softcap: float | None = None) -> Any:
    config = build_config(family, layers=2, hidden_size=16, heads=2, vocab_size=VOCAB, sliding_window=4)
    if softcap is not None:
        config.final_logit_softcapping = softcap
    return build_causal_lm(config, seed)


def batch() -> TokenBatch:
    """Prompts of 1, 4 and 7 tokens, completions of 5, 1 and 3."""
    prompts = [[2], [2, 7, 8, 9], [2, 30, 31, 32, 33, 34, 35]]
    return TokenBatch.from_ids(prompts, [[11, 12, 13, 14, 1], [1], [21, 22, 5]])


def statistics(lm: Any, ref: Any, tokens: TokenBatch, temperature: float, chunk_bytes: int = 2**20) -> TokenStats:
    model, reference = (ScoredModel(copy.deepcopy(each), chunk_bytes=chunk_bytes) for each in (lm, ref))
    rows = plain_rows(tokens)
    request = StatsRequest(temperature=temperature, entropy=True, score_norms=True, reference=True)
    return token_stats(model, rows, request, FrozenReference(reference).states(rows))


@torch.no_grad()
def by_hand(lm: Any, ref: Any, tokens: TokenBatch, temperature: float) -> dict[str, Tensor]:
    """Every statistic from whole-vocabulary logits of one unpadded row at a time. [B, C] each, 0 at pads."""
    out = {name: torch.zeros(tokens.completion_ids.shape).double() for name in TokenStats._fields[:5]}
    for row in range(len(tokens)):
        prompt = tokens.prompt_ids[row][tokens.prompt_mask[row]]
        completion = tokens.completion_ids[row][tokens.completion_mask[row]]
        ids = torch.cat([prompt, completion])[None]
        one, other = (m(ids).logits[0, len(prompt) - 1 : -1].double() / temperature for m in (lm, ref))
        full, ref_full = one.log_softmax(-1), other.log_softmax(-1)
        pi, here = full.exp(), slice(0, len(completion))
        onehot = nn.functional.one_hot(completion, VOCAB)
        out["logprobs"][row, here] = (full * onehot).sum(-1)
        out["entropy"][row, here] = -(pi * full).sum(-1)
        out["score_norms"][row, here] = (onehot - pi).square().sum(-1)
        out["kl"][row, here] = (pi * (full - ref_full)).sum(-1)
        out["ref_logprobs"][row, here] = (ref_full * onehot).sum(-1)
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("family", "softcap", "dtype"),
    [
        ("gemma", None, torch.float32),
        ("gemma2", 1.5, torch.float32),  # bends every logit
        ("gemma", None, torch.float64),
        # Capped like Gemma 2. Gemma 2's eager attention takes its softmax in fp32, where a float64 mask overflows.
        ("gemma3", 1.5, torch.float64),
    ],
)
def test_statistics_are_those_of_full_logits(
    family: str, softcap: float | None, dtype: torch.dtype, temperature: float
) -> None:
    """Tolerance in fp32: rounding of logits of order 3 (2⁻²⁴ each), summed over V; in float64 the same."""
    tolerance = 5e-6 if dtype == torch.float32 else 1e-12
    lm, ref = (language_model(family, seed, softcap).to(dtype).eval() for seed in (0, 1))
    got, expected = statistics(lm, ref, batch(), temperature), by_hand(lm, ref, batch(), temperature)
    for name, value in expected.items():
        found = getattr(got, name)
        assert found.dtype == dtype, name
        torch.testing.assert_close(found.double(), value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert bool((found[~batch().completion_mask] == 0).all()), name
    assert float(expected["kl"].max()) > 0.05  # the two models really differ


def test_the_softcap_is_in_the_distribution() -> None:
    """cap·tanh(x/cap), with the same weights: log-probabilities of a capped model are those of capped logits."""
    lm, ref = language_model("gemma2", 0, softcap=1.5), language_model("gemma2", 0, softcap=None)
    ref.config.final_logit_softcapping = None
    capped, free = (statistics(m, m, batch(), 1.0).logprobs.detach() for m in (lm, ref))
    assert float((capped - free).abs().max()) > 0.05
    with torch.no_grad():
        logits = ref(batch().prompt_ids[1][batch().prompt_mask[1]][None]).logits[0, -1]
    expected = (1.5 * torch.tanh(logits / 1.5)).log_softmax(-1)[1]
    torch.testing.assert_close(capped[1, 0], expected, atol=2e-6, rtol=0)


def test_bf16_compute_gives_fp32_statistics() -> None:
    """Autocast lowers matrix products only; the weights stay fp32 and so do softmax and log."""
    lm = language_model()
    model = ScoredModel(lm, compute_dtype=torch.bfloat16)
    got = token_stats(model, plain_rows(batch()), StatsRequest(entropy=True))
    exact = by_hand(lm, lm, batch(), 1.0)["logprobs"]
    assert got.logprobs.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    gap = (got.logprobs.detach().double() - exact).abs().max()
    assert 1e-5 < float(gap) < 0.05  # really bf16 (2⁻⁹ relative on logits of order 3), and no worse


def gradients(lm: Any, ref: Any, name: str, chunk_bytes: int) -> Tensor:
    model, reference = (ScoredModel(copy.deepcopy(each), chunk_bytes=chunk_bytes) for each in (lm, ref))
    rows = plain_rows(batch())
    found = getattr(token_stats(model, rows, EVERYTHING, FrozenReference(reference).states(rows)), name)
    (found * torch.arange(1.0, 1.0 + found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["logprobs", "kl"])
def test_chunks_do_not_change_values_or_gradients(name: str) -> None:
    lm, ref = (language_model(seed=seed).double() for seed in (0, 1))
    whole, cut = (statistics(lm, ref, batch(), 1.0, size) for size in (2**20, THREE_POSITIONS))
    for one, other in zip(whole[:5], cut[:5], strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=0)  # float64 rounding
    one, other = (gradients(lm, ref, name, size) for size in (2**20, THREE_POSITIONS))
    assert float((one - other).norm() / one.norm()) <= 1e-12


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, tuple | list) else [found]:
            self.elements = max(self.elements, made.numel() if isinstance(made, Tensor) else 0)
        return found


def test_a_tile_is_the_most_that_is_ever_made_of_the_logits() -> None:
    """60 positions × 50 ids are 3,000 logits; tiles have 150, and nothing else is larger than the weight's 800."""
    head = ChunkedHead(nn.Linear(16, VOCAB, bias=False), softcap=2.0, chunk_bytes=THREE_POSITIONS)
    hidden, targets = torch.randn(60, 16, requires_grad=True), torch.arange(60) % VOCAB
    request = StatsRequest(temperature=0.7, entropy=True, score_norms=True, reference=True)
    with Largest() as forward:
        stats = PositionStats(*head(hidden, targets, request, ReferenceStates(hidden.detach(), head)))
    assert stats.kl is not None
    with Largest() as backward:
        (stats.logprobs + stats.kl).sum().backward()  # type: ignore[no-untyped-call]
    assert max(forward.elements, backward.elements) <= 60 * 16


def test_the_gradient_is_added_to_the_weight_where_it_lies() -> None:
    """Two microbatches: the sum is that of plain accumulation, and the buffer stays the same one."""
    fused, plain = (ScoredModel(language_model(), fused=fused) for fused in (True, False))
    buffers = []
    for _ in range(2):
        for model in (fused, plain):
            token_stats(model, plain_rows(batch()), StatsRequest()).logprobs.sum().backward()  # type: ignore[no-untyped-call]
        buffers.append(fused.head.weight.grad)
    assert buffers[0] is buffers[1]
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_layers_computed_again_give_the_same_gradient(family: str) -> None:
    """`batch.activations: recompute`, with rows that share a prompt: masks of ours go through it too."""
    tokens = replace(batch(), prompt_ids=batch().prompt_ids[[2, 2, 2]], prompt_mask=batch().prompt_mask[[2, 2, 2]])
    rows = SharedPrompts()(replace(tokens, group=torch.zeros_like(tokens.group)))
    assert rows.segments is not None
    gradients, kept = [], []
    for again in (False, True):
        model, saved = ScoredModel(language_model(family)).train(), []
        if again:
            keep_activations(model.causal_lm, "recompute")
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
        ):
            total = token_stats(model, rows, StatsRequest()).logprobs.sum()
        total.backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        kept.append(sum(saved))
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to take them off")
def test_activations_cannot_leave_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"batch\.activations=offload .* set recompute or keep"):
        keep_activations(language_model(), "offload")


def test_a_frozen_head_gets_no_gradient() -> None:
    for fused in (True, False):
        linear = nn.Linear(4, VOCAB).requires_grad_(False)
        head, hidden = ChunkedHead(linear), torch.randn(7, 4, requires_grad=True)
        head.fused = fused
        head(hidden, torch.arange(7), StatsRequest())[0].sum().backward()
        assert linear.weight.grad is None and linear.bias.grad is None and hidden.grad is not None


def test_bf16_gradients_are_those_of_autocast() -> None:
    """The same products in bf16 and the rest in fp32: as near to fp32 as torch's own autocast is."""
    torch.manual_seed(0)
    linear, hidden, targets = (
        nn.Linear(64, VOCAB, bias=False),
        torch.randn(40, 64, requires_grad=True),
        torch.arange(40),
    )

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), (linear.weight, hidden))])

    exact = gradient(linear(hidden).log_softmax(-1)[range(40), targets])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradient(linear(hidden).float().log_softmax(-1)[range(40), targets])
        ours = gradient(ChunkedHead(linear, chunk_bytes=600)(hidden, targets, StatsRequest())[0])
    errors = [float((found - exact).norm() / exact.norm()) for found in (plain, ours)]
    assert 1e-4 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("chunk_bytes", [2**20, THREE_POSITIONS])
def test_gradients_are_finite_differences(chunk_bytes: int) -> None:
    """Of logprobs and exact KL in the hidden states, in float64 (the trunk has norms in fp32, the head has nothing)."""
    lm, ref = (language_model("gemma3", seed, softcap=3.0).double() for seed in (0, 1))
    head, other = (ScoredModel(each, chunk_bytes=chunk_bytes).head for each in (lm, ref))
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(5, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([3, 0, 49, 7, 7])
    request = StatsRequest(temperature=0.7, reference=True)

    def found(states: Tensor) -> tuple[Tensor, Tensor]:
        stats = PositionStats(*head(states, targets, request, ReferenceStates(ref_hidden, other)))
        assert stats.kl is not None
        return stats.logprobs, stats.kl

    assert torch.autograd.gradcheck(found, hidden.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_only_logprobs_and_kl_carry_gradient() -> None:
    got = statistics(language_model(seed=0), language_model(seed=1), batch(), 1.0)
    assert [value.requires_grad for value in got[:5] if value is not None] == [True, False, False, True, False]


def test_nothing_is_computed_that_was_not_asked_for() -> None:
    got = token_stats(ScoredModel(language_model()), plain_rows(batch()), StatsRequest())
    assert got._fields[0] == "logprobs" and all(value is None for value in got[1:])


def test_exact_kl_without_reference_states_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference states"):
        token_stats(ScoredModel(language_model()), plain_rows(batch()), EVERYTHING)


def test_the_head_sees_completion_positions_only() -> None:
    """9 completion tokens in rows of 12 columns: 9 hidden states reach the head, not 36 and not 18 real tokens."""
    model, seen = ScoredModel(language_model()), []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    token_stats(model, plain_rows(batch()), StatsRequest())
    assert seen == [9] == [int(batch().completion_mask.sum())]


def test_a_batch_without_completion_tokens() -> None:
    """A filler has to run through forward and backward like any other microbatch, and contribute nothing."""
    empty = TokenBatch.from_ids([[2, 7], [2]], [[], []])
    model = ScoredModel(language_model())
    got = token_stats(model, plain_rows(empty), StatsRequest(entropy=True))
    assert got.logprobs.shape == (2, 0)
    got.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plain_rows(TokenBatch.from_ids([[2], []], [[5], [6]]))


def test_dropout_is_off_in_training_mode() -> None:
    lm = tiny_lm(attention_dropout=0.5)
    lm.model.layers[0].mlp.act_fn = nn.Sequential(lm.model.layers[0].mlp.act_fn, nn.Dropout(0.5))
    model = ScoredModel(lm)
    rows = plain_rows(batch())
    once, twice = (token_stats(model.train(), rows, StatsRequest()).logprobs for _ in range(2))
    assert torch.equal(once, twice) and torch.equal(once, token_stats(model.eval(), rows, StatsRequest()).logprobs)


def test_tied_weights_stay_tied_through_a_step_and_a_copy() -> None:
    lm = language_model()
    names = list(lm.state_dict())
    model = ScoredModel(lm)
    assert isinstance(lm.lm_head, ChunkedHead) and list(lm.state_dict()) == names
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert len([p for p in model.parameters() if p.shape == (VOCAB, 16)]) == 1  # counted and stepped once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    token_stats(model, plain_rows(batch()), StatsRequest()).logprobs.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(lm.lm_head.weight, lm.get_input_embeddings().weight)
    twin = copy.deepcopy(lm)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize(("family", "tied"), [("gemma", True), ("gemma2", True), ("gemma", False)])
def test_generate_and_save_go_on_working(family: str, tied: bool, tmp_path: Path) -> None:
    plain = language_model(family)
    if not tied:
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().flip(0).clone())
    plain = plain.eval()
    scored = ScoredModel(copy.deepcopy(plain)).eval()
    ids = batch().prompt_ids[2:]
    config: Any = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[no-untyped-call]
    written = [
        m.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for m in (plain, scored.causal_lm)
    ]
    assert torch.equal(*written)
    scored.causal_lm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain(ids).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_a_head_with_bias_and_its_own_weights() -> None:
    linear = nn.Linear(4, VOCAB).double()
    hidden, targets = (
        torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.arange(7),
    )
    head = ChunkedHead(linear, chunk_bytes=2 * 4 * VOCAB)
    torch.testing.assert_close(head(hidden), linear(hidden), atol=0, rtol=0)
    expected = linear(hidden).log_softmax(-1)[targets, targets]
    torch.testing.assert_close(head(hidden, targets, StatsRequest())[0], expected, atol=1e-14, rtol=0)


def test_tokens_that_can_never_be_drawn_come_first() -> None:
    """A bias of −inf rules them out, all of the first tile: nothing of it is counted, forwards or backwards."""
    linear = nn.Linear(4, VOCAB)
    with torch.no_grad():
        linear.bias[:30] = -torch.inf
    hidden, targets = torch.randn(7, 4, requires_grad=True), torch.arange(40, 47)
    own = ChunkedHead(linear, chunk_bytes=2 * 4 * VOCAB)(hidden, targets, StatsRequest())[0]
    expected = linear(hidden).log_softmax(-1)[range(7), targets]
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)  # fp32 rounding
    gradients = [
        torch.autograd.grad(each.sum(), [hidden, linear.weight], retain_graph=True) for each in (own, expected)
    ]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_the_gradient_added_in_place_survives_hooks_on_saved_tensors() -> None:
    """They hand backward another tensor than the parameter; its ``grad`` is not the parameter's."""
    linear = nn.Linear(4, VOCAB, bias=False)
    head, hidden = ChunkedHead(linear), torch.randn(7, 4)
    head.fused = True
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        total = head(hidden, torch.arange(7), StatsRequest())[0].sum()
    total.backward()
    expected = torch.autograd.grad(linear(hidden).log_softmax(-1)[range(7), range(7)].sum(), linear.weight)[0]
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, expected, atol=1e-6, rtol=1e-5)  # fp32 rounding


def test_a_frozen_head_makes_no_buffer_for_its_gradient() -> None:
    linear = nn.Linear(16, VOCAB, bias=False).requires_grad_(False)
    head, hidden = ChunkedHead(linear, chunk_bytes=THREE_POSITIONS), torch.randn(7, 16, requires_grad=True)
    total = head(hidden, torch.arange(7), StatsRequest())[0].sum()
    with Largest() as backward:
        total.backward()
    assert backward.elements < VOCAB * 16
