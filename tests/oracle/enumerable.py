"""An autoregressive policy small enough to enumerate: 8 prompts, 4 tokens, at most 3 of them, 40 completions a prompt.

Every expectation is a finite sum here, so a wrong sign or a missing term shows as a number and not as noise. Logits are
free parameters per prompt and prefix. The draws follow one numpy generator in a fixed order, because the reference
numbers in the tests belong to them.

P = prompts, N = completions of a prompt, T = longest completion, D = parameters of a prompt. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from rlhf.maths import kl, logprobs

# (logprobs [rows, T], exact per-position KL [rows, T], rows) -> summed loss
Loss = Callable[[Tensor, Tensor, "Rows"], Tensor]


@dataclass(frozen=True)
class Language:
    """All completions over ``vocabulary`` tokens, the last of which stops, cut at ``longest``."""

    vocabulary: int
    longest: int

    @cached_property
    def completions(self) -> list[tuple[int, ...]]:
        def extend(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            for token in range(self.vocabulary):
                longer = (*prefix, token)
                ended = token == self.vocabulary - 1 or len(longer) == self.longest
                found += [longer] if ended else extend(longer)
            return found

        return extend(())

    @cached_property
    def prefixes(self) -> list[tuple[int, ...]]:
        return sorted({done[:at] for done in self.completions for at in range(len(done))})

    @cached_property
    def tokens(self) -> Tensor:
        """[N, T] int64, 0 where there is none."""
        return torch.tensor([(*done, *(0,) * (self.longest - len(done))) for done in self.completions])

    @cached_property
    def mask(self) -> Tensor:
        """[N, T] bool."""
        return torch.arange(self.longest) < torch.tensor([len(done) for done in self.completions])[:, None]

    @cached_property
    def prefix_of(self) -> Tensor:
        """[N, T] int64: which row of a prompt's logits decides each token."""
        number = {prefix: at for at, prefix in enumerate(self.prefixes)}
        rows = [[number[done[:at]] if at < len(done) else 0 for at in range(self.longest)] for done in self.completions]
        return torch.tensor(rows)

    def greedy(self, logits: Tensor) -> int:
        """Which completion arg-max decoding gives. logits: [prefixes, V] of one prompt."""
        done: tuple[int, ...] = ()
        while done not in self.completions:
            done = (*done, int(logits[self.prefixes.index(done)].argmax()))
        return self.completions.index(done)


@dataclass(frozen=True)
class Rows:
    """Chosen completions as the rows of a batch. prompt, completion, group [B] int64; valid [B] bool."""

    prompt: Tensor
    completion: Tensor
    group: Tensor
    valid: Tensor
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    rewards: Tensor
    score_norms: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """[B, T] log π/π_ref, 0 at pads."""
        return torch.where(self.mask, self.logprobs - self.ref_logprobs, 0.0)


@dataclass(frozen=True)
class Policy:
    """logits, ref_logits [P, prefixes, V]; rewards [P, N]: the reward model's score of every completion."""

    language: Language
    logits: Tensor
    ref_logits: Tensor
    rewards: Tensor
    temperature: float = 1.0

    @cached_property
    def logprobs(self) -> Tensor:
        """[P, N, T] nats, 0 at pads."""
        return self._per_prompt(lambda logits, _: self._chosen(logits))

    @cached_property
    def ref_logprobs(self) -> Tensor:
        return self._per_prompt(lambda _, ref: self._chosen(ref))

    @cached_property
    def exact_kl(self) -> Tensor:
        """[P, N, T] nats: KL of the next-token distributions at the prefixes a completion visits, 0 at pads."""
        return self._per_prompt(self._kl)

    @cached_property
    def score_norms(self) -> Tensor:
        def norms(logits: Tensor, _: Tensor) -> Tensor:
            at_token = logprobs.score_norms(logits[self.language.prefix_of], self.language.tokens, self.temperature)
            return torch.where(self.language.mask, at_token, 0.0)

        return self._per_prompt(norms)

    @cached_property
    def probs(self) -> Tensor:
        """[P, N]: π(y|x)."""
        return self.logprobs.sum(-1).exp()

    @cached_property
    def scores(self) -> Tensor:
        """[P, N, T, D]: ∇ log π(y_t|·), by automatic differentiation."""
        return self._jacobian(lambda logits, _: self._chosen(logits))

    @cached_property
    def kl_gradients(self) -> Tensor:
        """[P, N, T, D]: ∇ of ``exact_kl``."""
        return self._jacobian(self._kl)

    @property
    def log_ratio(self) -> Tensor:
        """[P, N]: log π(y|x)/π_ref(y|x)."""
        return (self.logprobs - self.ref_logprobs).sum(-1)

    def value(self, beta: float, logits: Tensor | None = None) -> Tensor:
        """[P]: J = E[r] − β·KL(π‖π_ref), differentiable in ``logits`` if given."""
        logprob = self.logprobs.sum(-1) if logits is None else torch.stack([self._chosen(x).sum(-1) for x in logits])
        return (logprob.exp() * (self.rewards - beta * (logprob - self.ref_logprobs.sum(-1)))).sum(-1)

    def gradient(self, beta: float) -> Tensor:
        """[P, D]: ∇J by differentiating the enumerated J, no score function involved."""
        logits = self.logits.clone().requires_grad_()
        return torch.autograd.grad(self.value(beta, logits).sum(), logits)[0].flatten(1)

    def kl_gradient(self) -> Tensor:
        """[P, D]: ∇KL(π‖π_ref) of whole completions."""
        return Policy(self.language, self.logits, self.ref_logits, 0 * self.rewards).gradient(-1.0)

    def rows(self, prompt: Tensor, completion: Tensor, group: Tensor, valid: Tensor | None = None) -> Rows:
        at = (prompt, completion)
        return Rows(
            prompt=prompt,
            completion=completion,
            group=group,
            valid=torch.ones_like(prompt, dtype=torch.bool) if valid is None else valid,
            mask=self.language.mask[completion],
            logprobs=self.logprobs[at],
            ref_logprobs=self.ref_logprobs[at],
            kl=self.exact_kl[at],
            rewards=self.rewards[at],
            score_norms=self.score_norms[at],
        )

    def every_completion(self) -> Rows:
        """P·N rows, each a group of its own: for losses that look at one completion at a time."""
        prompts, size = self.probs.shape
        prompt = torch.arange(prompts).repeat_interleave(size)
        return self.rows(prompt, torch.arange(size).repeat(prompts), torch.arange(prompts * size))

    def groups(self, prompt: int, completions: Tensor) -> Rows:
        """completions [M, k] of one prompt → M·k rows in M groups."""
        flat = completions.flatten()
        group = torch.arange(len(completions)).repeat_interleave(completions.shape[1])
        return self.rows(torch.full_like(flat, prompt), flat, group)

    def every_group(self, prompt: int, k: int) -> tuple[Rows, Tensor]:
        """All N^k groups of a prompt and their probabilities [N^k]."""
        size = self.probs.shape[1]
        completions = torch.cartesian_prod(*[torch.arange(size)] * k).reshape(-1, k)
        return self.groups(prompt, completions), self.probs[prompt][completions].prod(1)

    def descent(self, loss: Loss, rows: Rows) -> tuple[Tensor, Tensor]:
        """−∂loss/∂log π and −∂loss/∂KL per token, [B, T] each: what one row adds to the ascent direction."""
        live, live_kl = rows.logprobs.clone().requires_grad_(), rows.kl.clone().requires_grad_()
        grads = torch.autograd.grad(loss(live, live_kl, rows), (live, live_kl), allow_unused=True)
        by_logprob, by_kl = (torch.zeros_like(rows.kl) if grad is None else -grad for grad in grads)
        return by_logprob, by_kl

    def row_gradients(self, loss: Loss, rows: Rows) -> Tensor:
        """[B, D]: −∇loss of each row by itself (its part of the sum)."""
        by_logprob, by_kl = self.descent(loss, rows)
        at = (rows.prompt, rows.completion)
        return torch.einsum("bt,btd->bd", by_logprob, self.scores[at]) + torch.einsum(
            "bt,btd->bd", by_kl, self.kl_gradients[at]
        )

    def group_gradients(self, loss: Loss, rows: Rows, k: int) -> Tensor:
        """[M, D]: −∇loss/k of M groups of one prompt, rows in group order (``groups``, ``every_group``)."""
        by_logprob, by_kl = self.descent(loss, rows)
        prompt, groups = int(rows.prompt[0]), len(rows.prompt) // k
        size, longest = self.language.mask.shape
        total = torch.zeros(groups, self.scores.shape[-1], dtype=torch.float64)
        for weights, table in ((by_logprob, self.scores), (by_kl, self.kl_gradients)):
            if not bool(weights.any()):
                continue
            # Few distinct tokens exist: add up their weights per group, then multiply once.
            spread = torch.zeros(groups, size, longest, dtype=torch.float64)
            spread.index_put_((rows.group, rows.completion), weights, accumulate=True)
            total += spread.flatten(1) @ table[prompt].flatten(0, 1)
        return total / k

    def _chosen(self, logits: Tensor) -> Tensor:
        language = self.language
        found = logprobs.token_logprobs(logits[language.prefix_of], language.tokens, self.temperature)
        return torch.where(language.mask, found, 0.0)

    def _kl(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        full, ref = (logprobs.log_softmax(x, self.temperature) for x in (logits, ref_logits))
        return torch.where(self.language.mask, kl.exact_kl(full, ref)[self.language.prefix_of], 0.0)

    def _per_prompt(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.stack([function(*pair) for pair in zip(self.logits, self.ref_logits, strict=True)])

    def _jacobian(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        jacobian: Tensor = torch.func.vmap(torch.func.jacrev(function))(self.logits, self.ref_logits)
        return jacobian.flatten(-2)


BETA = 0.5


@lru_cache
def reference_policy() -> Policy:
    """The policy of the published tables (seed 0): off its reference, prompts with different means and spreads."""
    language = Language(vocabulary=4, longest=3)
    rng = np.random.default_rng(0)
    prompts, size = 8, len(language.completions)
    ref = rng.normal(size=(prompts, len(language.prefixes), 4))
    rewards = rng.normal(size=(prompts, size)) + rng.normal(size=(prompts, 1)) + 2.0
    spread = np.exp(rng.normal(size=(prompts, 1)) * 0.7)
    mean = rewards.mean(1, keepdims=True)
    rewards = mean + (rewards - mean) * spread
    logits = ref + 0.7 * rng.normal(size=ref.shape)
    return Policy(language, torch.from_numpy(logits), torch.from_numpy(ref), torch.from_numpy(rewards))


@lru_cache
def shifted_policy(shift: float) -> Policy:
    """The same task, further from the reference: logits = reference + shift·N(0, 1) (seed 1)."""
    task = reference_policy()
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=tuple(task.ref_logits.shape)))
    return Policy(task.language, task.ref_logits + shift * noise, task.ref_logits, task.rewards)


def draw_groups(policy: Policy, prompt: int, groups: int, k: int, seed: int) -> Tensor:
    """[groups, k] completions drawn from π(·|prompt)."""
    probs = policy.probs[prompt].numpy()
    drawn = np.random.default_rng(seed).choice(len(probs), size=(groups, k), p=probs / probs.sum())
    return torch.from_numpy(drawn)


def expectation(probs: Tensor, per_row: Tensor) -> Tensor:
    """Σ_y π(y)·v(y). [P, N], [P, N, D] → [P, D]."""
    return (probs[..., None] * per_row).sum(-2)


def trace_covariance(probs: Tensor, per_row: Tensor) -> float:
    """Mean over prompts of the variance (trace) of v(y). [P, N], [P, N, D]."""
    mean = expectation(probs, per_row)
    return float(((probs * per_row.square().sum(-1)).sum(-1) - mean.square().sum(-1)).mean())


def sample_variance(per_group: Tensor) -> float:
    """Trace of the covariance over equally likely rows. [M, D]."""
    return float((per_group - per_group.mean(0)).square().sum(1).mean())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
