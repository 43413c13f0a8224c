"""The public RewardBench's four sections (Lambert et al. 2024), from accuracies by ``subset``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf.maths.ranking import Estimate

# Subset → how many examples it counts for in its section. ``math-prm`` has 447 and counts for as many as code has.
SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}


def sections(by_subset: Mapping[str, tuple[int, Estimate]]) -> dict[str, tuple[int, Estimate]]:
    """section → (pairs, score with its error), of the sections that any known subset belongs to.

    score = Σ w·accuracy / Σ w over the subsets that are there, with the benchmark's own counts as weights, so that a
    part of the rows gives the same figure on average. A subset that the benchmark does not know is a section itself.
    """
    found: dict[str, tuple[int, Estimate]] = {}
    for name, weights in SECTIONS.items():
        known = {subset: by_subset[subset] for subset in weights if subset in by_subset}
        if known:
            total = sum(weights[subset] for subset in known)
            share = {subset: weights[subset] / total for subset in known}
            value = sum(share[subset] * estimate.value for subset, (_, estimate) in known.items())
            error = math.sqrt(sum((share[subset] * estimate.error) ** 2 for subset, (_, estimate) in known.items()))
            found[name] = (sum(pairs for pairs, _ in known.values()), Estimate(value, error))
    if not found:
        return {}
    everywhere = {subset for weights in SECTIONS.values() for subset in weights}
    return found | {name: entry for name, entry in by_subset.items() if name not in everywhere}
