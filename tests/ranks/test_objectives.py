"""PPO (two models in one engine) and DPO, offline and online, on two ranks end where one process ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from . import start

RECIPE = """
objective: ppo
run: {name: one, seed: 3, steps: 2}
policy: {path: start, compute_dtype: float32}
reward: {functions: [{call: "rlhf.data.quickstart:gold"}], missing_eos_score: null}
data: {train: [{path: "rlhf.data.quickstart:preferences", max_rows: 32}]}
rollout: {samples_per_prompt: 2, max_new_tokens: 6}
kl: {beta: 0.1}
ppo: {epochs: 2, minibatches: 1}
optim: {lr: 1.0e-3}
batch: {prompts_per_step: 4, microbatch_tokens: 512}
checkpoint: {every_steps: 1}
tracking: {to: []}
"""
LORA = ("policy.lora.r=4", "policy.lora.alpha=8")
BY_LAYER = "rollout.gather=layers"
RECOMPUTE = "batch.activations=recompute"  # one process keeps its activations: the step is the same
# accelerate config → name of the run → (objective, settings, settings of the two ranks alone)
CASES: dict[str, dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "cpu_2ranks": {
        "ppo": ("ppo", (), ()),
        "ppo-recompute": ("ppo", (), (RECOMPUTE,)),
        "online-dpo": ("dpo", ("dpo.online=true",), ()),
        "grpo": ("grpo", (), ()),
        "reinforce-plus-plus": ("reinforce_plus_plus", (), ()),
        "simpo": ("simpo", (), ()),
        "small-steps": ("reinforce", ("optim.kl_step_limit=1e-4", "reference.ema=0.5"), ()),
        "trpo": ("trpo", ("trpo.iterations=3",), ()),
        "lora": ("rloo", LORA, (RECOMPUTE,)),
        "shared-prompts": ("rloo", ("rollout.samples_per_prompt=8", "batch.share_prompts=true"), ()),
    },
    "cpu_zero2": {
        "dpo": ("dpo", (), ()),
        "shared-critic": ("ppo", ("value.shared=true", "ppo.whiten_rewards=true", "ppo.stop_kl=1.0"), ()),
        "lora": ("rloo", LORA, (RECOMPUTE,)),
    },
    "cpu_zero3": {
        "ppo": ("ppo", (), ()),
        "lora": ("rloo", LORA, (RECOMPUTE,)),
        "shared-prompts": ("rloo", ("rollout.samples_per_prompt=8", "batch.share_prompts=true"), ()),
        "layers": ("rloo", (), (BY_LAYER,)),
    },
    "cpu_zero1": {"ppo": ("ppo", (), ())},
    "cpu_fsdp2": {
        "ppo": ("ppo", (), ()),
        "shared-critic": ("ppo", ("value.shared=true", "ppo.whiten_rewards=true"), ()),
        "dpo": ("dpo", (), ()),
        "lora": ("rloo", LORA, (RECOMPUTE,)),
        "layers-lora": ("remax", LORA, (BY_LAYER,)),
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """accelerate config → the folder in which all its runs have ended: with one process, and with two."""

    @cache
    def folder(config: str) -> Path:
        place, cases = tmp_path_factory.mktemp(config), CASES[config].items()
        start.write(place, RECIPE)
        start.train_several(place, None, [_run(f"alone-{name}", *case[:2]) for name, case in cases])
        both = [_run(f"both-{name}", case[0], (*case[1], *case[2])) for name, case in cases]
        start.train_several(place, _config(config, place), both)
        return place

    return folder


def _run(name: str, objective: str, settings: tuple[str, ...]) -> tuple[str, ...]:
    return (f"run.name={name}", f"objective={objective}", *settings)


def _config(name: str, place: Path) -> Path:
    if name != "cpu_zero1":
        return start.CONFIGS / f"{name}.yaml"
    text = (start.CONFIGS / "cpu_zero2.yaml").read_text(encoding="utf-8")
    assert "zero_stage: 2" in text
    (place / "zero1.yaml").write_text(text.replace("zero_stage: 2", "zero_stage: 1"), encoding="utf-8")
    return place / "zero1.yaml"


@pytest.mark.ranks
@pytest.mark.slow  # half a minute a config, for what the layouts' own tests prove of the gradient
@pytest.mark.parametrize(("config", "name"), [(config, name) for config in CASES for name in CASES[config]])
def test_two_ranks_end_where_one_does(config: str, name: str, finished: Callable[[str], Path]) -> None:
    folder, objective = finished(config), CASES[config][name][0]
    alone, both = (start.weights(folder, f"{kind}-{name}", objective) for kind in ("alone", "both"))
    assert start.apart(alone, both) <= 1e-5


@pytest.mark.ranks
@pytest.mark.slow  # two processes that import everything, for one number
def test_fsdp2_in_bfloat16_takes_the_same_gradient(tmp_path: Path) -> None:
    """Norms and their weights are rounded too, where autocast keeps them float32: 8 bits each, over sums."""
    start.write(tmp_path, RECIPE)
    norms = []
    for config in ("cpu", "cpu_fsdp2"):
        start.trained(tmp_path, f"bf16-{config}", "rloo", "policy.compute_dtype=bfloat16", "--accelerate", config)
        text = (tmp_path / "runs" / f"bf16-{config}-rloo" / "metrics.jsonl").read_text(encoding="utf-8")
        norms.append(next(row["optim/grad_norm"] for row in map(json.loads, text.splitlines()) if row["step"] == 1))
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)
