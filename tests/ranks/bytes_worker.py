"""Run by every rank of tests/ranks/test_bytes.py: what one rank holds of policy and reward model, in elements."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf.interfaces import StatsRequest
from rlhf.models.layout import plain_rows
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.scalar import ScalarModel
from rlhf.models.scratch import build_causal_lm, build_config, build_reward_model
from rlhf.runtime import distributed
from rlhf.runtime.placement import place
from tests.support import fixed_rollout


def main(out: Path) -> None:
    torch.set_num_threads(1)
    runtime = distributed.start(max_grad_norm=1.0, compute_dtype=torch.float32)
    policy = ScoredModel(build_causal_lm(_config(64), seed=0))
    judge = ScalarModel(build_reward_model(_config(128), seed=1))
    whole = {"policy": _elements(policy.parameters()), "reward model": _elements(judge.parameters())}
    placed = place(judge, "zero3", runtime.device, runtime)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    model, _ = distributed.prepare(runtime, policy, optimizer)
    loss = token_stats(model, plain_rows(fixed_rollout(2, 2)), StatsRequest()).logprobs.sum()
    held = _of_fsdp(policy, optimizer, loss) if runtime.kind == "fsdp2" else _of_zero(policy, model, loss)
    held["reward model"] = _elements(_shares(placed.model))
    facts = runtime.gather_objects({"held": held, "whole": whole})
    if runtime.main:
        out.write_text(json.dumps(facts), encoding="utf-8")
    distributed.leave(runtime)


def _of_zero(policy: nn.Module, model: nn.Module, loss: Tensor) -> dict[str, int]:
    engine = cast(Any, model)
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    engine.backward(loss)
    zero = engine.optimizer
    held = {
        "weights": _elements(_shares(policy)),
        "gradients": zero.grad_partitions_flat_buffer.numel(),
    }
    engine.step()
    moments = [state for state in zero.optimizer.state.values() if "exp_avg" in state]
    held["moments"] = _elements(state[key] for state in moments for key in ("exp_avg", "exp_avg_sq"))
    held["fp32 weights"] = _elements(zero.fp32_partitioned_groups_flat)
    return held


def _of_fsdp(policy: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> dict[str, int]:
    """What storage really holds: a share may be a view of something larger."""
    loss.backward()  # type: ignore[no-untyped-call]
    weights = list(policy.parameters())
    gradients = [cast(Tensor, weight.grad) for weight in weights]
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    kinds = {"weights": weights, "gradients": gradients, "moments": moments, "fp32 weights": weights}
    return {kind: _stored(parts) for kind, parts in kinds.items()}


def _stored(parts: Sequence[Tensor]) -> int:
    """Each storage once: the gradients of a layer arrive in one."""
    locals_ = [cast(Any, part).to_local() for part in parts]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in locals_}.values()) // 4


def _config(hidden: int) -> Any:
    return build_config("gemma", layers=2, hidden_size=hidden, heads=2, vocab_size=2048)


def _shares(model: nn.Module) -> list[Tensor]:
    return [cast(Any, parameter).ds_tensor for parameter in model.parameters()]


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
