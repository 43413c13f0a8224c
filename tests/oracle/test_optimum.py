"""Three roads to one place, π*(y|x) ∝ π_ref(y|x)·exp(r(x, y)/β).

The exact policy gradient, DPO with Bradley–Terry labels and sampled RLOO end there: at temperature 1, with one β, full
support and the reward's own scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.maths import baselines, losses

from .enumerable import BETA, Language, Policy, reference_policy

Logits = Tensor


def log_optimum(task: Policy) -> Tensor:
    """[P, N]: log π*."""
    return (task.ref_logprobs.sum(-1) + task.rewards / BETA).log_softmax(1)


def divergence(task: Policy, logits: Logits) -> float:
    """KL(π‖π*), nats, a mean over prompts."""
    logprob = at(task, logits).logprobs.sum(-1)
    return float((logprob.exp() * (logprob - log_optimum(task))).sum(1).mean())


def at(task: Policy, logits: Logits) -> Policy:
    return Policy(task.language, logits.detach(), task.ref_logits, task.rewards)


def table(language: Language, logits: Logits) -> Tensor:
    """[P, N, T] nats, differentiable, 0 at pads."""
    full = logits.log_softmax(-1)[:, language.prefix_of]
    chosen = full.gather(-1, language.tokens.expand(len(logits), -1, -1)[..., None])[..., 0]
    return torch.where(language.mask, chosen, 0.0)


def test_the_table_is_the_policy() -> None:
    task = reference_policy()
    torch.testing.assert_close(table(task.language, task.logits), task.logprobs, rtol=0, atol=1e-12)
    assert divergence(task, task.logits) > 0.5  # there is a way to go


def test_the_exact_natural_gradient_arrives() -> None:
    """θ ← θ + F⁺∇J/β is Newton's step for this objective: a few of them are enough. F is singular (a constant added to
    a prefix's logits changes nothing), hence the pseudo-inverse."""
    task, logits = reference_policy(), reference_policy().logits
    for _ in range(12):
        policy = at(task, logits)
        score = policy.scores.sum(2)  # [P, N, D]
        fisher = torch.einsum("pn,pnd,pne->pde", policy.probs, score, score)
        step = (torch.linalg.pinv(fisher, rtol=1e-12, hermitian=True) @ policy.gradient(BETA)[..., None])[..., 0]
        logits = logits + step.view_as(logits) / BETA
    assert abs(divergence(task, logits)) < 1e-9


def test_population_dpo_arrives() -> None:
    """Every pair of completions with the label that a Bradley–Terry annotator of the reward's scale would give it."""
    task = reference_policy()
    first, second = torch.combinations(torch.arange(task.probs.shape[1])).unbind(1)
    label = torch.sigmoid(task.rewards[:, first] - task.rewards[:, second])
    logits = task.logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=3000, tolerance_grad=1e-13, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_ratio = table(task.language, logits).sum(-1) - task.ref_logprobs.sum(-1)
        margin = log_ratio[:, first] - log_ratio[:, second]
        loss = losses.dpo_sum(margin.flatten(), label.flatten(), BETA) / len(first)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert abs(divergence(task, logits)) < 1e-9


def test_hard_labels_go_elsewhere() -> None:
    """The same pairs with p = 1 for the better one lead away from π*, and further the longer they are trained on."""
    task = reference_policy()
    first, second = torch.combinations(torch.arange(task.probs.shape[1])).unbind(1)
    label = (task.rewards[:, first] > task.rewards[:, second]).double()
    logits = task.logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    found = []
    for step in range(900):
        optimizer.zero_grad()
        log_ratio = table(task.language, logits).sum(-1) - task.ref_logprobs.sum(-1)
        margin = log_ratio[:, first] - log_ratio[:, second]
        torch.autograd.backward(losses.dpo_sum(margin.flatten(), label.flatten(), BETA))
        optimizer.step()
        found += [divergence(task, logits)] if step % 300 == 299 else []
    assert 0.5 < found[0] < found[1] < found[2]


def test_sampled_rloo_arrives_within_a_hundredth_of_a_nat() -> None:
    """600 steps of 64 groups of 4 a prompt, Adam with a falling rate: nothing but samples and leave-one-out."""
    task, k, groups = reference_policy(), 4, 64
    generator = torch.Generator().manual_seed(0)
    logits = task.logits.clone().requires_grad_()
    optimizer, steps = torch.optim.Adam([logits], lr=0.1), 600
    prompts, rows = len(task.rewards), groups * k
    prompt = torch.arange(prompts).repeat_interleave(rows)
    group = torch.arange(prompts * groups).repeat_interleave(k)
    valid = torch.ones(len(prompt), dtype=torch.bool)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        logprobs = table(task.language, logits)
        drawn = torch.multinomial(
            logprobs.detach().sum(-1).exp(), rows, replacement=True, generator=generator
        ).flatten()
        live = logprobs[prompt, drawn]
        log_ratio = (live.detach() - task.ref_logprobs[prompt, drawn]).sum(1)
        penalized = task.rewards[prompt, drawn] - BETA * log_ratio
        baseline = baselines.leave_one_out(penalized, group, valid)
        advantages = baselines.advantages(penalized, baseline, valid)
        optimizer.zero_grad()
        loss = losses.policy_gradient_sum(live, advantages, task.language.mask[drawn], valid) / rows
        torch.autograd.backward(loss)
        optimizer.step()
    assert 0 <= divergence(task, logits) < 0.01
