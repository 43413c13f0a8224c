"""The one table of objectives: name → class, formula, what it needs. Torch-free: checking a recipe must be quick."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Program = Literal["policy", "sft", "reward"]

COMMON_SECTIONS = ("run", "policy", "data", "optim", "batch", "eval", "checkpoint", "tracking")
POLICY_SECTIONS = (*COMMON_SECTIONS, "reference", "reward", "rollout", "kl", "instruction")
# A name reached from a recipe: code outside this package, or a function that makes rows or rewards.
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One objective.

    target: ``module:Class``. formula: what it does to the weights, one line. needs: rows and models it cannot do
    without, in words. program: the loop that runs it. sections: the recipe sections that it reads (None: any).
    """

    target: str
    formula: str
    needs: tuple[str, ...]
    program: Program
    sections: frozenset[str] | None


OBJECTIVES: Mapping[str, Preset] = MappingProxyType(
    {
        "reinforce": Preset(
            target="rlhf.objectives.reinforce:Reinforce",
            formula="maximise E[r(x, y)] − β·KL(π‖π_ref):  ∇J = E[(r − β·log π/π_ref − b)·∇log π(y|x)]",
            needs=("prompts", "a reward model or a reward function", "a reference"),
            program="policy",
            sections=frozenset({*POLICY_SECTIONS, "reinforce"}),
        ),
        "sft": Preset(
            target="rlhf.objectives.supervised:Demonstrations",
            formula="maximise E_data[Σ_t log π(y_t | x, y_<t)]",
            needs=("completions written by somebody",),
            program="sft",
            sections=frozenset({*COMMON_SECTIONS, "sft"}),
        ),
        "reward": Preset(
            target="rlhf.objectives.supervised:BradleyTerry",
            formula="maximise E_pairs[log σ(r(x, y_chosen) − r(x, y_rejected))]",
            needs=("pairs of a better and a worse completion",),
            program="reward",
            sections=frozenset({*COMMON_SECTIONS, "reward_model"}),
        ),
    }
)

# Names that people know and that this version refuses by name, instead of guessing at a near one.
NOT_IN_THIS_VERSION = frozenset(
    (
        *("ppo", "dpo", "rloo", "remax", "reinforce_plus_plus", "reinforce_plus_plus_baseline"),
        *("grpo", "dr_grpo", "a2c", "raft", "trpo", "kto", "simpo"),
    )
)


def is_dotted(name: str) -> bool:
    """Whether ``name`` has the shape ``package.module:attribute``."""
    return DOTTED.fullmatch(name) is not None


def preset(name: str) -> Preset:
    """The objective of that name; ``package.module:Class`` is an objective of the policy loop from outside.

    Raises KeyError for any other name (the recipe rules refuse it first, with a suggestion).
    """
    if is_dotted(name):
        needs = ("whatever its `needs` say",)
        return Preset(target=name, formula=f"defined by {name}", needs=needs, program="policy", sections=None)
    return OBJECTIVES[name]
