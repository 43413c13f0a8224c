"""Run by every rank of tests/ranks/test_layouts.py: five updates on one fixed global batch, written down by rank 0; for
each estimator of the KL, in a folder of its name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlhf.interfaces import StatsRequest, TrainState
from rlhf.models import load
from rlhf.models.layout import plain_rows
from rlhf.objectives.reinforce import Reinforce
from rlhf.runtime import distributed, microbatches, training_state
from rlhf.runtime.schedule import learning_rate_schedule
from rlhf.runtime.updater import PolicyForward, Term, Updater
from tests.support import fixed_rollout, policy_and_reference

STEPS, PROMPTS, K = 5, 4, 4
BUDGET = 95  # tokens: 8 rows of 11 fit, 8 of 13 do not


def main(out: Path, estimators: Sequence[str]) -> None:
    torch.set_num_threads(1)
    runtime = distributed.start(max_grad_norm=1.0, compute_dtype=torch.float32)
    for estimator in estimators:
        train(runtime, out / estimator, estimator)


def train(runtime: distributed.Runtime, out: Path, estimator: str) -> None:
    # small tiles, so that the head has several of them
    policy, reference = policy_and_reference(chunk_bytes=5 * 4 * 300)
    if runtime.world_size > 1 and estimator == "exact":  # one process keeps its activations: the step is the same
        load.keep_activations(policy.causal_lm, "recompute")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    model, wrapped = distributed.prepare(runtime, policy, optimizer)
    objective = Reinforce(beta=0.1, estimator=estimator, baseline="shrinkage")  # type: ignore[arg-type]
    own = runtime.share(PROMPTS, "prompts")
    rollout = fixed_rollout(PROMPTS, K).select(list(range(own.start * K, own.stop * K)))
    ref = microbatches.score(rollout, lambda b: reference.stats(plain_rows(b), StatsRequest()), 100, runtime)
    rollout = replace(rollout, ref_logprobs=ref.logprobs, rollout_logprobs=ref.logprobs)
    # rank 0 holds the short prompts: both its groups fit one microbatch, rank 1's take two, so rank 0 runs a filler
    updater = Updater(
        runtime,
        model,
        wrapped,
        learning_rate_schedule(1e-3, "linear", total_steps=STEPS, warmup_ratio=0.2),
        PolicyForward(reference),
        BUDGET,
        1.0,
    )
    prepared, _ = objective.prepare(rollout, TrainState(), runtime)
    facts: dict[str, list[float]] = {"lr": [], "norm": [], "loss": [], "microbatches": []}
    for step in range(1, STEPS + 1):
        report = updater.step([Term(objective=objective, batch=prepared)], step)
        facts["lr"].append(report.lr)
        facts["norm"].append(report.grad_norm)
        facts["loss"].append(sum(report.losses.values()))
        facts["microbatches"].append(report.microbatches)
        files = training_state.collect(runtime, model, wrapped)
        if runtime.main and step in (1, STEPS):
            save_file({**files["model"], **files["optimizer"]}, out / f"step{step}.safetensors")
    if runtime.main:
        save_file({name: torch.tensor(v, dtype=torch.float64) for name, v in facts.items()}, out / "facts.safetensors")
        (out / "kind").write_text(f"{runtime.kind} {runtime.world_size}")
    resume(runtime, model, wrapped, updater, objective, prepared, out)


def resume(runtime, model, wrapped, updater, objective, prepared, out: Path) -> None:  # type: ignore[no-untyped-def]
    """The saved state put into a FRESH engine takes the same sixth step, bit for bit."""
    files = runtime.gather_objects(training_state.collect(runtime, model, wrapped))[0]
    report = updater.step([Term(objective=objective, batch=prepared)], STEPS)
    expected = training_state.collect(runtime, model, wrapped)
    policy, reference = policy_and_reference(seed=5, chunk_bytes=5 * 4 * 300)
    fresh = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    again, optimizer = distributed.prepare(runtime, policy, fresh)
    training_state.restore(runtime, again, optimizer, files)
    _, reference = policy_and_reference(chunk_bytes=5 * 4 * 300)
    second = Updater(runtime, again, optimizer, updater.learning_rate, PolicyForward(reference), BUDGET, 1.0)
    repeated = second.step([Term(objective=objective, batch=prepared)], STEPS)
    got = training_state.collect(runtime, again, optimizer)
    if runtime.main:
        same = all(torch.equal(expected[f][n], got[f][n]) for f in expected for n in expected[f])
        (out / "resumed").write_text("same" if same and report.grad_norm == repeated.grad_norm else "different")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
