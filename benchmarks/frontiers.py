"""Gold against KL: the methods, their tuning on a seed that no comparison uses, and what a difference says.

`METHODS` (`reinforce` is leave-one-out with the exact KL), each with the learning rate that does best on the tuning
seed, on fresh seeds at every β of `BETAS`. Gold is interpolated in √KL between the runs of a seed: chords of a concave
curve, so a method whose runs lie far from a root is judged a little low. Differences between methods are paired by
seed, given one SFT model, one reward model and one set of held-out prompts, and not corrected for their number.
`MARGIN` was set before the first run. Our RLOO and TRL's are the same algorithm: they are compared at one rate, TRL's,
whatever the tuning seed says of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from runs import ROOT, Bench, Job

EXACT = ("objective=reinforce", "kl.estimator=exact")
METHODS: Mapping[str, tuple[str, ...]] = {
    "reinforce": EXACT,
    "rloo": ("objective=rloo",),
    "rloo_2_updates": ("objective=rloo", "reinforce.updates_per_rollout=2"),  # as many optimizer steps as PPO takes
    "ppo": ("objective=ppo",),
    "grpo": ("objective=grpo",),
    "reinforce_plus_plus": ("objective=reinforce_plus_plus",),
    "trl_rloo": (),
}
BETAS = (0.0, 0.1, 0.3, 0.8)
RATES = (5e-4, 1e-3)  # with 2.5e-4, 20 steps end below √KL = 2 even without a penalty
TUNING_SEED, TUNING_BETA = 100, 0.1
SEEDS = (1, 2, 3, 4, 5)
ROOTS = (1.0, 1.5, 2.0, 3.0)  # √KL at which gold is compared; 1.5 came after three seeds: few runs get to 2
MARGIN = 0.15  # gold; the recipe gains about 1
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 2, 3, … 10 seeds


def frontier_job(method: str, lr: float, beta: float, seed: int) -> Job:
    return Job(method=method, overrides=METHODS[method], lr=lr, beta=beta, seed=seed, steps=20, prompts=16)


def best_rate(bench: Bench, method: str) -> float:
    """The rate that ends with the highest gold on the tuning seed, which no comparison uses: of ``RATES``, which go on
    by factors of 2 while the last is the best."""
    rates = list(RATES)

    def gold(lr: float) -> float:
        return float(bench.row(frontier_job(method, lr, TUNING_BETA, TUNING_SEED))["gold"])

    while max(rates, key=gold) == rates[-1] and len(rates) < len(RATES) + 2:
        rates.append(2 * rates[-1])
    return max(rates, key=gold)


def interpolated(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """Gold at √KL = ``at`` on the line through (√KL, gold) points; None beyond the last."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def golds(rows: Sequence[Mapping[str, Any]], start: float) -> dict[float, float | None]:
    """Of the runs of one method and seed: gold at each of ``ROOTS``; every frontier begins at the SFT model."""
    points = [(0.0, start), *((math.sqrt(max(row["kl"], 0.0)), row["gold"]) for row in rows)]
    return {root: interpolated(points, root) for root in ROOTS}


def compared(
    ours: Mapping[int, Mapping[float, float | None]], other: Mapping[int, Mapping[float, float | None]]
) -> list[dict[str, Any]]:
    """ours − other at each root over the seeds that reach it: mean, 95 % interval, and what it says."""
    found = []
    for root in ROOTS:
        pairs = [(ours[seed][root], other[seed][root]) for seed in ours if seed in other]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(differences) < max(2, len(pairs)):  # those that get there are not any seeds
            found.append({"root_kl": root, "seeds": len(differences), "verdict": "not reached by every seed"})
            continue
        mean = sum(differences) / len(differences)
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
        half = T975[len(differences) - 2] * spread / math.sqrt(len(differences))
        found.append(
            {
                "root_kl": root,
                "seeds": len(differences),
                "difference": round(mean, 3),
                "low": round(mean - half, 3),
                "high": round(mean + half, 3),
                "verdict": verdict(mean - half, mean + half),
            }
        )
    return found


def verdict(low: float, high: float) -> str:
    """What a 95 % interval of (ours − other) says with the margin."""
    if low > 0:
        return "superior"
    if low > -MARGIN and high < MARGIN:
        return "equivalent"
    if low > -MARGIN:
        return "not inferior"
    return "inferior" if high < 0 else "undecided"


def frontiers(bench: Bench, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Seed by seed, so that whatever is finished can be compared."""
    rates = {method: best_rate(bench, method) for method in methods}
    rows = [
        bench.row(frontier_job(method, rates[method], beta, seed))
        for seed in seeds
        for method in methods
        for beta in BETAS
    ]
    same = [] if not {"rloo", "trl_rloo"} <= rates.keys() else _at_one_rate(bench, rates["trl_rloo"], seeds)
    return {"rates": rates, "rows": rows, "rloo_at_the_rate_of_trl": same}


def _at_one_rate(bench: Bench, lr: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [bench.row(frontier_job("rloo", lr, beta, seed)) for seed in seeds for beta in BETAS]


def comparison(rows: Sequence[Mapping[str, Any]], same_rate: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Our REINFORCE against every other method, and our RLOO (``same_rate``) against TRL's."""
    starts = [row["gold_before"] for row in rows if row["gold_before"] is not None]
    start = sum(starts) / len(starts)
    curves = by_seed(rows, start)
    ours = curves.get("reinforce", {})
    pairs = {f"reinforce - {name}": compared(ours, other) for name, other in curves.items() if name != "reinforce"}
    if same_rate and "trl_rloo" in curves:
        pairs["rloo - trl_rloo, at one rate"] = compared(by_seed(same_rate, start)["rloo"], curves["trl_rloo"])
    return {"gold_of_sft": round(start, 3), "pairs": pairs}


def by_seed(rows: Sequence[Mapping[str, Any]], start: float) -> dict[str, dict[int, dict[float, float | None]]]:
    """method → seed → gold at each root, of seeds whose every β has run."""
    curves: dict[str, dict[int, dict[float, float | None]]] = {}
    for method, seed in sorted({(row["method"], row["seed"]) for row in rows}):
        mine = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
        if len(mine) == len(BETAS):
            curves.setdefault(method, {})[seed] = golds(mine, start)
    return curves


def picture(rows: Sequence[Mapping[str, Any]], start: float) -> None:
    """Mean gold over seeds at each β, against √KL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = []
        for beta in BETAS:
            mine = [row for row in rows if row["method"] == method and row["beta"] == beta]
            if mine:
                roots, gold = [math.sqrt(max(row["kl"], 0.0)) for row in mine], [row["gold"] for row in mine]
                points.append((sum(roots) / len(mine), sum(gold) / len(mine)))
        axes.plot(*zip((0.0, start), *sorted(points), strict=True), marker="o", linewidth=1.8, label=method)
    axes.set(xlabel="√KL from the SFT model (nats)", ylabel="hidden gold score, held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "objectives.png", dpi=100)
