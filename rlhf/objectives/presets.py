"""The one table of objectives: name → class, formula, what it needs. Torch-free: checking a recipe must be quick."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Program = Literal["policy", "preference", "sft", "reward"]

COMMON_SECTIONS = ("run", "policy", "data", "optim", "batch", "eval", "checkpoint", "tracking")
POLICY_SECTIONS = (*COMMON_SECTIONS, "reference", "reward", "rollout", "kl", "instruction")
# A name reached from a recipe: code outside this package, or a function that makes rows or rewards.
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One objective.

    target: ``module:Class``. formula: what it does to the weights, one line. needs: rows and models it cannot do
    without, in words. program: the loop that runs it. sections: the recipe sections that it reads (None: any).
    settings: field of the class → recipe keys of which the first that is not null fills it (None: the class is given
    the recipe). pins: dotted recipe keys that the name stands for, whatever the recipe says. source: paper. bias: what
    it is known to distort, empty where the gradient is unbiased. online: recipe key that moves it from the data's pairs
    to the policy loop. trust_region: steps are taken by ``TrustRegion``.
    """

    target: str
    formula: str
    needs: tuple[str, ...]
    program: Program
    sections: frozenset[str] | None
    settings: Mapping[str, tuple[str, ...]] | None = None
    pins: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    bias: str = ""
    online: str = ""
    trust_region: bool = False


def _keys(*same: str, **renamed: str) -> Mapping[str, tuple[str, ...]]:
    """Fields named like their key (``reinforce.baseline``), and ``field="first.key or.else"``."""
    return MappingProxyType(
        {key.rpartition(".")[2]: (key,) for key in same}
        | {field: tuple(keys.split()) for field, keys in renamed.items()}
    )


_SAMPLED = ("prompts", "a reward model or a reward function", "a reference")


_REINFORCE = _keys(
    *("kl.beta", "kl.estimator", "kl.credit", "kl.loss_beta", "kl.loss_estimator", "rollout.temperature"),
    *("reinforce.baseline", "reinforce.divide_by", "reinforce.average", "reinforce.skip_zero_variance"),
    *("reinforce.updates_per_rollout", "reinforce.importance_cap", "reinforce.importance"),
    mismatch_cap="rollout.correction",
    stale="rollout.ahead",
)
_PPO = _keys(
    *("kl.beta", "kl.target", "rollout.temperature", "value.warmup_steps"),
    *("ppo.clip", "ppo.gamma", "ppo.gae_lambda", "ppo.epochs", "ppo.minibatches", "ppo.stop_kl"),
    *("ppo.whiten_rewards", "ppo.whiten_advantages"),
    value_clip="value.clip",
    value_coefficient="value.coefficient",
    mismatch_cap="rollout.correction",
)


def _reinforce(formula: str, source: str, bias: str = "", **pins: Any) -> Preset:
    """A member of the REINFORCE family: settings of section ``reinforce`` under the name people search for."""
    return Preset(
        target="rlhf.objectives.reinforce:Reinforce",
        formula=formula,
        needs=_SAMPLED,
        program="policy",
        sections=frozenset({*POLICY_SECTIONS, "reinforce"}),
        settings=_REINFORCE,
        pins=MappingProxyType({f"reinforce.{key}": value for key, value in pins.items()}),
        source=source,
        bias=bias,
    )


_ACTOR_CRITIC = frozenset({*POLICY_SECTIONS, "ppo", "value"} - {"instruction"})
_UNBIASED: Mapping[str, Any] = MappingProxyType({"divide_by": "none", "average": "completions"})
_OWN_MEAN = "the mean holds the completion's own reward: (1 − 1/k) times the gradient"
_BY_GROUP = "each prompt's gradient is divided by its own random spread, which turns the mean gradient (cosine .88)"
_BY_LENGTH = "1/|y| turns the gradient (cosine .97): short right and long wrong answers are favoured"


OBJECTIVES: Mapping[str, Preset] = MappingProxyType(
    {
        "reinforce": _reinforce(
            "maximise E[r(x, y)] − β·KL(π‖π_ref):  ∇J = E[(r − β·log π/π_ref − b)·∇log π(y|x)]",
            "Williams 1992",
        ),
        "rloo": _reinforce(
            "reinforce with b = mean reward of the prompt's other completions",
            "Kool et al. 2019; Ahmadian et al. 2024",
            baseline="leave_one_out",
            **_UNBIASED,
        ),
        "remax": _reinforce(
            "reinforce with b = reward of the prompt's greedy completion",
            "Li et al. 2023",
            baseline="greedy",
            **_UNBIASED,
        ),
        "reinforce_plus_plus": _reinforce(
            "reinforce with A = (r − batch mean) / batch std, a mean over tokens",
            "Hu 2025",
            "a random scale of the step; the direction is kept up to O(1/B)",
            baseline="batch_mean",
            divide_by="batch_std",
            average="tokens",
        ),
        "reinforce_plus_plus_baseline": _reinforce(
            "reinforce with A = (r − group mean) / batch std, a mean over tokens",
            "Hu 2025",
            f"{_OWN_MEAN}; a random scale of the step",
            baseline="group_mean",
            divide_by="batch_std",
            average="tokens",
        ),
        "grpo": _reinforce(
            "reinforce with A = (r − group mean) / group std, log π a mean over the completion's tokens",
            "Shao et al. 2024",
            f"{_BY_GROUP}; {_BY_LENGTH}; {_OWN_MEAN}",
            baseline="group_mean",
            divide_by="group_std",
            average="completion_tokens",
        ),
        "dr_grpo": _reinforce(
            "reinforce with b = group mean", "Liu et al. 2025", _OWN_MEAN, baseline="group_mean", **_UNBIASED
        ),
        "ppo": Preset(
            target="rlhf.objectives.ppo:Ppo",
            formula="maximise E[min(ρ·A, clip(ρ, 1 ± ε)·A)], ρ = π/π_old a token, A = GAE(γ, λ) of r − β·log π/π_ref",
            needs=(*_SAMPLED, "a value model, made of the reward model unless value.init says otherwise"),
            program="policy",
            sections=_ACTOR_CRITIC,
            settings=_PPO,
            source="Schulman et al. 2017; Ziegler et al. 2019",
            bias="λ < 1 trusts the value model; clipping and token ratios bias every step after the first",
        ),
        "a2c": Preset(
            target="rlhf.objectives.ppo:Ppo",
            formula="reinforce with b = V(x, y_<t), learned:  A_t = r − β·Σ_{u≥t} log π/π_ref(y_u) − V(x, y_<t)",
            needs=(*_SAMPLED, "a value model, made of the reward model unless value.init says otherwise"),
            program="policy",
            sections=_ACTOR_CRITIC,
            settings=_PPO,
            pins=MappingProxyType({"ppo.gamma": 1.0, "ppo.gae_lambda": 1.0, "ppo.epochs": 1, "ppo.minibatches": 1}),
            source="Williams 1992; Sutton et al. 2000; Mnih et al. 2016",
        ),
        "trpo": Preset(
            target="rlhf.objectives.reinforce:Reinforce",
            formula="reinforce's gradient g, stepped along (F + λI)⁻¹g as far as KL(π_new‖π_old) ≤ trpo.max_kl",
            needs=(*_SAMPLED, "memory for nine copies of the trained weights (policy.lora makes them small)"),
            program="policy",
            sections=frozenset({*POLICY_SECTIONS, "reinforce", "trpo"}),
            settings=_REINFORCE,
            source="Schulman et al. 2015; Kakade 2001",
            trust_region=True,
        ),
        "dpo": Preset(
            target="rlhf.objectives.dpo:Dpo",
            formula="maximise E_pairs[log σ(β·(log π/π_ref(y_chosen) − log π/π_ref(y_rejected)))]",
            needs=("pairs of a better and a worse completion; or prompts and a reward, with dpo.online", "a reference"),
            program="preference",
            sections=frozenset({*POLICY_SECTIONS, "dpo"} - {"instruction"}),
            online="dpo.online",
            settings=_keys("dpo.loss", "dpo.labels", beta="dpo.beta kl.beta", smoothing="dpo.label_smoothing"),
            source="Rafailov et al. 2023",
            bias="offline: its optimum is that of the pairs' annotators, where the pairs reach; kl.beta stands for β",
        ),
        "simpo": Preset(
            target="rlhf.objectives.simpo:Simpo",
            formula="maximise E_pairs[log σ(β·(log π(y_chosen)/|y_chosen| − log π(y_rejected)/|y_rejected|) − margin)]",
            needs=("pairs of a better and a worse completion",),
            program="preference",
            sections=frozenset({*POLICY_SECTIONS, "simpo"} - {"instruction"}),
            settings=_keys("simpo.beta", "simpo.margin"),
            source="Meng et al. 2024",
            bias="no reference: only the learning rate and the number of steps keep the policy near where it started",
        ),
        "raft": Preset(
            target="rlhf.objectives.raft:Raft",
            formula="maximise E[log π(y_best|x)], y_best = the prompt's completion with the highest penalized reward",
            needs=_SAMPLED,
            program="policy",
            sections=frozenset(POLICY_SECTIONS),
            settings=_keys("kl.beta", "rollout.temperature"),
            source="Dong et al. 2023",
            bias="imitates the best of k; no policy gradient: how far the others fell behind does not count",
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
NOT_IN_THIS_VERSION = frozenset(("kto",))


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
