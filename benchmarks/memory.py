"""Peak memory and time of log-probabilities over a large vocabulary, forwards and backwards: tiles against all logits.

    OMP_NUM_THREADS=1 python benchmarks/memory.py              10 minutes, 14 GiB of memory for the plain side

Bytes of tensors beyond the weight, its gradient, the hidden states and theirs, which are there before. `plain` is
log_softmax of the logits and a gather, as autograd does it; `torch` is its linear_cross_entropy in chunks of its
own choice (it knows no temperature, soft-cap, entropy or KL); `exact` asks for the KL to a reference with a head of its
own too (plain: not run beyond 32k, where it would hold 20 GiB). Medians over rounds, side after side.

Writes results/memory.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import tensor_bytes
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf.interfaces import StatsRequest
from rlhf.maths.kl import exact_kl
from rlhf.models.head import ChunkedHead, ReferenceStates

SIZES = (
    (4096, 128, 4096),
    (4096, 512, 32768),
    (1024, 512, 262144),
    (4096, 512, 262144),
)  # positions, hidden, vocabulary


def sides(positions: int, hidden: int, vocab: int, exact: bool) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    linear, other = (nn.Linear(hidden, vocab, bias=False) for _ in range(2))
    other.requires_grad_(False)
    head, ref_head = ChunkedHead(linear), ChunkedHead(other)
    head.fused = True
    states, ref_states = torch.randn(positions, hidden, requires_grad=True), torch.randn(positions, hidden)
    targets, weights = torch.randint(vocab, (positions,)), torch.randn(positions)
    linear.weight.grad, states.grad = torch.zeros_like(linear.weight), torch.zeros_like(states)

    def tiles() -> None:
        found = head(states, targets, StatsRequest(reference=exact), ReferenceStates(ref_states, ref_head))
        backward(found[0], found[3])

    def plain() -> None:
        full = linear(states).log_softmax(-1)
        kl = exact_kl(full, other(ref_states).log_softmax(-1)) if exact else None
        backward(full.gather(1, targets[:, None])[:, 0], kl)

    def backward(logprobs: Tensor, kl: Tensor | None) -> None:
        total = (logprobs * weights).sum() if kl is None else (logprobs * weights + kl).sum()
        total.backward()  # type: ignore[no-untyped-call]

    def torch_chunks() -> None:
        options = torch.nn.LinearCrossEntropyOptions()
        loss = functional.linear_cross_entropy(states, linear.weight, targets, reduction="none", options=options)
        backward(-loss, None)

    found: dict[str, Callable[[], None]] = {"tiles": tiles}
    if not exact and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch"] = torch_chunks
    return found if exact and vocab > 32768 else {**found, "plain": plain}


def measure(positions: int, hidden: int, vocab: int, exact: bool, rounds: int) -> dict[str, Any]:
    chosen = sides(positions, hidden, vocab, exact)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, run in chosen.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {"positions": positions, "hidden": hidden, "vocab": vocab, "exact": exact}
    for name, run in chosen.items():
        with tensor_bytes.peak() as peak:
            run()
        found[f"{name}_seconds"] = round(statistics.median(seconds[name]), 3)
        found[f"{name}_mib"] = round(peak.bytes / 2**20, 1)
    found["gflop"] = round((12 if exact else 8) * positions * hidden * vocab / 1e9, 1)  # of what tiles multiply
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for exact in (False, True):
        for size in SIZES:
            rows.append(measure(*size, exact, rounds))
            print(rows[-1], flush=True)
    record.write("memory", {"threads": 1, "dtype": "float32", "rounds": rounds}, rows)


if __name__ == "__main__":
    main()
