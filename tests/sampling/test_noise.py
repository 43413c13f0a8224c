"""The noise as a random number generator. Seeds are fixed: a z beyond 4.5 (p < 1e-5) is a defect, not bad luck."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.sampling import noise
from rlhf.sampling.noise import Workspace, exponentials, position_keys, row_keys, sample_tokens

LIMIT = 4.5


def keys(rows: int, *, seed: int = 0, step: int = 1, slot: int = 0, sample: int = 0, position: int = 0) -> Tensor:
    slots = torch.arange(rows) + slot
    return position_keys(row_keys(seed, step, slots, torch.full_like(slots, sample)), position)


def uniforms(of: Tensor, vocab: int) -> Tensor:
    """The u behind E = -log(1 - u)."""
    return -torch.expm1(-exponentials(of, vocab, torch.float64))


def z_of_counts(counts: Tensor, expected: Tensor) -> float:
    """How far a chi-square statistic is from its mean, in standard deviations."""
    freedom = counts.numel() - 1
    return float((((counts - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom))


def z_uniform(values: Tensor, bins: int = 256) -> float:
    counts = torch.histc(values.flatten(), bins, 0, 1)
    return z_of_counts(counts, torch.full_like(counts, values.numel() / bins))


def z_pairs(first: Tensor, second: Tensor, bins: int = 16) -> float:
    """Chi-square of the joint distribution on a bins × bins grid: independence, not only absence of correlation."""
    cells = (first * bins).long() * bins + (second * bins).long()
    counts = torch.bincount(cells.flatten(), minlength=bins * bins).double()
    return z_of_counts(counts, torch.full_like(counts, cells.numel() / bins**2))


def largest_gap(values: Tensor) -> float:
    """√n · Kolmogorov-Smirnov distance from the uniform distribution."""
    ordered = values.flatten().sort().values
    grid = torch.arange(1, ordered.numel() + 1, dtype=torch.float64) / ordered.numel()
    return float((ordered - grid).abs().max() * math.sqrt(ordered.numel()))


table = uniforms(keys(512), 1024)


def test_keys_are_the_published_splitmix_finaliser() -> None:
    # First output of SplitMix64 seeded with 0 (Vigna's reference code) is 0xe220a8397b1dcdaf: mix(0 + golden).
    assert int(noise._absorb(torch.zeros(1, dtype=torch.long), 0)) & (2**64 - 1) == 0xE220A8397B1DCDAF


def test_uniform_as_a_whole_per_row_and_in_the_tail_where_winners_are() -> None:
    assert abs(z_uniform(table, 1024)) < LIMIT
    assert largest_gap(table) < 1.95  # P = 1e-3
    assert max(abs(z_uniform(row, 16)) for row in table[:64]) < 6  # largest of 64 chi-squares with 15 degrees
    assert max(abs(z_uniform(column, 16)) for column in table.T[:64]) < 6
    for depth in (64, 1024):
        tail = table[table < 1 / depth] * depth
        assert abs(tail.numel() * depth / table.numel() - 1) < LIMIT * math.sqrt(depth / table.numel())
        assert abs(z_uniform(tail, 16)) < LIMIT


@pytest.mark.parametrize("apart", [1, 2, 3, 16, 64, 256])
def test_tokens_are_independent(apart: int) -> None:
    assert abs(z_pairs(table[:, :-apart], table[:, apart:])) < LIMIT


@pytest.mark.parametrize(
    "other",
    [
        *({"slot": 1}, {"sample": 1}, {"position": 1}, {"position": 2}, {"step": 2}, {"seed": 1}, {"seed": -1}),
        *({"seed": 2**40}, {"slot": 1, "sample": -1}, {"step": 0, "seed": 1}),
    ],
    ids=str,
)
def test_neighbouring_counters_are_independent(other: dict[str, int]) -> None:
    assert abs(z_pairs(table, uniforms(keys(512, **other), 1024))) < LIMIT


def test_number_of_small_values_in_a_row_has_binomial_variance() -> None:
    """Multiplicative hashes that put tokens on a lattice fail here: their small values come in bunches."""
    for share in (0.5, 1 / 64, 1 / 512):
        counts = torch.cat([(uniforms(keys(1024, slot=1024 * i), 512) < share).sum(1) for i in range(4)]).double()
        dispersion = ((counts - 512 * share).square() / (512 * share * (1 - share))).sum()
        assert abs(float(dispersion) - 4096) / math.sqrt(2 * 4096) < LIMIT


def test_every_pair_of_tokens_races_fairly() -> None:
    """P(token of probability .1 beats one of .9) for 2,000 pairs: z-scores of variance 1, so no pair is related."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 1024, (2000,), generator=generator)
    second = (first + torch.randint(1, 1024, (2000,), generator=generator)) % 1024
    drawn = exponentials(keys(2048, seed=5), 1024)
    wins = (drawn[:, second] / 0.1 < drawn[:, first] / 0.9).double().sum(0)
    z = (wins - 204.8) / math.sqrt(2048 * 0.09)
    assert abs(float(z.var()) - 1) < LIMIT * math.sqrt(2 / 2000)
    assert abs(float(z.mean())) < LIMIT / math.sqrt(2000) * 2  # pairs share tokens, so the mean spreads wider
    assert float(z.abs().max()) < 5


# name → (factor, mask): h_w = factor·h_v xor mask, modulo 2^32
RELATIONS = {
    **{f"h_w = {factor}·h_v": (factor, 0) for factor in (-1, 3, 5)},
    **{f"h_w = h_v xor 2^{bit}": (1, 1 << bit) for bit in (1, 2, 8, 16, 24, 29, 30, 31)},
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_tokens_with_arithmetically_related_hashes_are_independent(relation: str) -> None:
    """Among 256k tokens some pairs of hashes are multiples or neighbours of each other. One random multiplication would
    keep multiples related, and so would two without the shift between them."""
    hashes = noise._token_hashes(262144, torch.device("cpu"))
    at = {int(h) & 0xFFFFFFFF: token for token, h in enumerate(hashes.tolist())}
    factor, mask = RELATIONS[relation]
    related = {h: ((factor * h) ^ mask) & 0xFFFFFFFF for h in at}
    pairs = [(at[h], at[w]) for h, w in related.items() if w in at and w > h]
    assert len(pairs) >= 3
    first, second = zip(*pairs[:16], strict=True)
    work = Workspace(8192, len(first), torch.float64, torch.device("cpu"))
    drawn = []
    for tokens in (first, second):
        work.hashes = hashes[list(tokens)]
        drawn.append(-torch.expm1(work.negative_exponentials(noise._multipliers(keys(8192))).clone()))
    assert abs(z_pairs(drawn[0], drawn[1])) < LIMIT


def test_no_two_tokens_share_a_hash() -> None:
    hashes = noise._token_hashes(262144, torch.device("cpu"))
    assert len(set(hashes.tolist())) == 262144
    assert bool((hashes & 1 == 1).all())


def test_noise_depends_on_nothing_but_its_counter() -> None:
    whole = exponentials(keys(8), 300)
    assert torch.equal(exponentials(keys(8), 1000)[:, :300], whole)  # wider vocabulary
    assert torch.equal(exponentials(keys(8)[[5, 2]], 300), whole[[5, 2]])  # other rows, other order
    assert torch.equal(exponentials(keys(3, slot=4), 300), whole[4:7])
    wide = exponentials(keys(8), 300, torch.float64)
    near = wide < 1  # relative precision where winners are; near u = 1 a float32 u is all there is
    assert torch.allclose(wide[near].float(), whole[near], rtol=1e-6, atol=0.0)
    assert torch.allclose(torch.expm1(-wide).float(), torch.expm1(-whole), rtol=0.0, atol=2e-7)


def test_extreme_integers_give_positive_finite_noise() -> None:
    """y = 0 must not give E = 0 (it would win whatever its probability), y = 2^31 - 1 not E = ∞."""
    work = Workspace(1, 2, torch.float32, torch.device("cpu"))
    for value in (0, 1, 2**31 - 1):
        work.race[:, :2].copy_(torch.tensor([[value, value]], dtype=torch.int32))
        u = torch.add(work.minus_half, work.race[:, :2], alpha=noise.MINUS_SCALE)
        energy = -u.log1p()
        assert bool(((energy > 0) & energy.isfinite()).all())


@pytest.mark.parametrize(("vocab", "spread"), [(50, 0.0), (50, 1.5), (200, 4.0)])
def test_tokens_come_with_their_probabilities(vocab: int, spread: float) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    tokens, _ = sample_tokens(logits.expand(60_000, vocab), 1.0, keys(60_000))
    expected = logits.double().softmax(0) * 60_000
    counts = torch.bincount(tokens, minlength=vocab).double()
    common = expected >= 5  # chi-square needs a few expected draws per cell; the rest is one cell
    pooled = [torch.cat([part[common], part[~common].sum()[None]]) for part in (counts, expected)]
    kept = [part[pooled[1] > 0] for part in pooled]
    assert abs(z_of_counts(*kept)) < LIMIT


def test_temperature_divides_logits() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    tokens, logprobs = sample_tokens(logits.expand(60_000, 4), 2.0, keys(60_000))
    expected = (logits / 2).double().softmax(0)
    counts = torch.bincount(tokens, minlength=4).double()
    assert abs(z_of_counts(counts, expected * 60_000)) < LIMIT
    assert torch.allclose(logprobs.double(), expected.log()[tokens], atol=1e-6)


def test_draws_of_neighbouring_positions_and_samples_are_independent() -> None:
    logits = torch.tensor([1.0, 0.0, 0.5, -0.5]).expand(40_000, 4)
    probabilities = logits[0].double().softmax(0)
    first, _ = sample_tokens(logits, 1.0, keys(40_000))
    for other in ({"position": 1}, {"sample": 1}, {"step": 2}, {"slot": 1}):
        second, _ = sample_tokens(logits, 1.0, keys(40_000, **other))
        counts = torch.bincount(first * 4 + second, minlength=16).double()
        assert abs(z_of_counts(counts, torch.outer(probabilities, probabilities).flatten() * 40_000)) < LIMIT


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_vocabulary_of_256k_has_neither_ties_nor_favourites(spread: float) -> None:
    """64 rows · 6 positions. Winners fall evenly over the vocabulary's probability mass, and the best race value is
    exponential: min E_v/π_v ~ Exp(1) exactly."""
    vocab, rows, positions = 256_000, 64, 6
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(vocab, generator=generator) * spread
    probabilities = logits.double().softmax(0)
    order = probabilities.argsort(descending=True)
    below = torch.empty(vocab, dtype=torch.float64).scatter_(0, order, probabilities[order].cumsum(0))
    mass, best, ties = [], [], 0
    for position in range(positions):
        at = keys(rows, position=position)
        tokens, _ = sample_tokens(logits.expand(rows, vocab), 1.0, at)
        # A winner stands for a random point in its own token's stretch of probability mass.
        within = torch.rand(rows, generator=generator, dtype=torch.float64)
        mass.append(below[tokens] - probabilities[tokens] * within)
        if position < 2:
            race = exponentials(at, vocab) / probabilities.float()
            least = race.topk(2, largest=False).values
            ties += int((least[:, 0] == least[:, 1]).sum())
            best.append(least[:, 0])
            assert torch.equal(race.argmin(-1), tokens)
    assert ties == 0
    assert abs(z_uniform(torch.cat(mass), 16)) < LIMIT
    assert largest_gap(-torch.expm1(-torch.cat(best).double())) < 1.95


def test_recorded_logprobs_are_the_distributions() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(3)) * 3
    tokens, logprobs = sample_tokens(logits, 1.0, keys(64))
    exact = logits.double().log_softmax(-1)
    assert torch.allclose(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], atol=2e-6)  # 2 ulp of |logit| ~ 10
    wide_tokens, wide = sample_tokens(logits.double(), 1.0, keys(64))
    assert wide.dtype == torch.float64
    assert torch.equal(wide_tokens, tokens)
    assert torch.allclose(wide, exact.gather(1, tokens[:, None])[:, 0], atol=1e-12)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(4)).bfloat16()
    tokens, logprobs = sample_tokens(logits, 0.7, keys(16))
    exact = (logits.double() / 0.7).log_softmax(-1)
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], atol=2e-6)


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(37, 1000, generator=torch.Generator().manual_seed(5))
    whole = sample_tokens(logits, 1.3, keys(37))
    monkeypatch.setattr(noise, "_CPU_BLOCK", 5000)
    assert Workspace.like(logits).rows == 5
    for one, other in zip(whole, sample_tokens(logits, 1.3, keys(37)), strict=True):
        assert torch.equal(one, other)
    kept = Workspace.like(logits)
    for position in (0, 1):  # a workspace in use does not remember
        fresh = sample_tokens(logits, 1.3, keys(37, position=position))
        again = sample_tokens(logits, 1.3, keys(37, position=position), kept)
        assert torch.equal(fresh[0], again[0])


def test_rounding_errors_of_logits_do_not_move_draws() -> None:
    """1e-6 on every logit moves one draw in 1e6; inverse-CDF sampling moves one in 200 at 256k tokens."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(400, 32_000, generator=generator) * 3
    moved = logits + torch.randn(logits.shape, generator=generator) * 1e-6
    assert torch.equal(sample_tokens(logits, 1.0, keys(400))[0], sample_tokens(moved, 1.0, keys(400))[0])


def test_without_keys_the_most_likely_token_is_taken() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    tokens, logprobs = sample_tokens(logits, 2.0, None)
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, (logits / 2).log_softmax(-1)[[0, 1], tokens], atol=1e-6)


def test_impossible_tokens_are_never_drawn_and_nan_stays_inside_the_vocabulary() -> None:
    logits = torch.full((1000, 65), -torch.inf)
    logits[:, [3, 64]] = 0.0
    tokens, logprobs = sample_tokens(logits, 1.0, keys(1000))
    assert set(tokens.tolist()) == {3, 64}
    assert torch.allclose(logprobs, torch.full((1000,), math.log(0.5)))
    broken, value = sample_tokens(torch.full((2, 65), torch.nan), 1.0, keys(2))
    assert bool(((broken >= 0) & (broken < 65)).all())
    assert bool(value.isnan().all())


def test_no_global_random_state_is_consumed() -> None:
    before = torch.get_rng_state()
    sample_tokens(torch.zeros(4, 100), 1.0, keys(4))
    assert torch.equal(before, torch.get_rng_state())
