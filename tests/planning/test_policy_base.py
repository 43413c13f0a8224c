"""A reward model on the policy's base: the plan counts that base once, and proposes nothing that cuts it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.assemble.rewards import refuse_other_bases
from rlhf.errors import UserError
from rlhf.planning import changes
from rlhf.planning.plan import make_plan
from rlhf.planning.setup import Judge, Setup
from rlhf.programs.plan import Options, plan_of
from rlhf.recipe import load_recipe
from rlhf.runtime.distributed import Runtime
from tests.planning.setups import seven_billion, two_billion

RECIPE = """
objective: reinforce
run: {{name: x}}
policy: {{path: google/gemma-2-2b-it, lora: {{r: 16}}}}
reward: {{models: [{{path: {path}, placement: {placement}}}]}}
data: {{train: [{{path: "json:loads"}}]}}
"""
OPTIONS = Options(gpus=8, memory="80GiB", accelerate="zero2")


def shared(setup: Setup) -> Setup:
    """With a reward model of rank 8 on the policy's base."""
    judge = Judge(shape=setup.policy.as_scalar(), tokens=16384, where="policy_base", rank=8)
    return replace(setup, rank=16, reference=None, judges=(judge,))


def test_the_base_is_counted_once() -> None:
    setup = shared(two_billion())
    policy, judge = make_plan(setup).roles
    alone = make_plan(replace(setup, judges=())).roles[0]
    assert policy.parts == alone.parts
    assert judge.parts == {"weights": 4 * (setup.policy.adapter(8) + 2048)}  # Gemma 2B is 2048 wide
    assert judge.where == "an adapter on the policy's base"
    whole = make_plan(replace(setup, judges=(replace(setup.judges[0], where="replicate"),))).roles[1]
    assert whole.total > 100 * judge.total
    assert make_plan(setup).host == 0


def test_nothing_that_cuts_the_base_is_proposed() -> None:
    setup = shared(seven_billion(placement=replace(seven_billion().placement, kind="zero2")))
    assert changes.zero3(setup) is changes.more_gpus(setup) is changes.frozen_shares(setup) is None
    assert changes.qlora(setup) is changes.quantized_judges(setup) is None
    apart = replace(setup, judges=(replace(setup.judges[0], where="replicate"),))
    assert changes.zero3(apart) is not None and changes.frozen_shares(apart) is not None


def judge_folder(path: Path) -> Path:
    """What the plan reads of a LoRA reward model's ``final/``: configurations."""
    from rlhf.models.scratch import build_config

    build_config("gemma", layers=2, hidden_size=64, heads=2, vocab_size=512).save_pretrained(path)
    (path / "adapter").mkdir()
    names = ["model.layers.0.self_attn.q_proj", "v_proj"]
    settings = {"r": 4, "target_modules": names, "base_model_name_or_path": "google/gemma-2-2b-it"}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_rank_and_targets_are_read_from_the_adapter(tmp_path: Path) -> None:
    folder = judge_folder(tmp_path / "final")
    (tmp_path / "r.yaml").write_text(RECIPE.format(path=folder, placement="policy_base"))
    recipe = load_recipe(str(tmp_path / "r.yaml"), inputs=False)
    (judge,) = plan_of(recipe, OPTIONS, tmp_path).setup.judges
    assert (judge.rank, judge.where) == (4, "policy_base")
    # q: 64 → 64, v: 64 → 32 of the one key head, in two layers
    assert judge.shape.linear_widths == 2 * (128 + 96)
    for shares in ("zero3", "fsdp2"):
        with pytest.raises(UserError, match=r"reward\.models\.0\.placement=policy_base: under ZeRO-3 and FSDP2"):
            plan_of(recipe, replace(OPTIONS, accelerate=shares), tmp_path)
        runtime = Runtime(accelerator=None, kind=shares, device=torch.device("cpu"))
        with pytest.raises(UserError, match=r"reward\.models\.0\.placement=policy_base: under ZeRO-3 and FSDP2"):
            refuse_other_bases(recipe, runtime)  # the run does, before it looks at the adapter
    chosen = plan_of(recipe, replace(OPTIONS, memory="4GiB", accelerate=None), tmp_path)  # ZeRO-3 is not tried
    assert not chosen.fits and chosen.setup.placement.kind == "zero2"


def test_rank_comes_from_the_recipe_that_makes_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = "objective: reward\nrun: {name: judge}\npolicy: {path: google/gemma-2-2b-it, lora: {r: 32}}\n"
    (tmp_path / "judge.yaml").write_text(reward + 'data: {train: [{path: "json:loads"}]}\n')
    (tmp_path / "r.yaml").write_text(RECIPE.format(path="runs/judge-reward/final", placement="policy_base"))
    recipe = load_recipe("r.yaml", inputs=False)
    assert plan_of(recipe, OPTIONS, tmp_path).setup.judges[0].rank == 32
    (tmp_path / "judge.yaml").unlink()
    with pytest.raises(UserError, match="no adapter there"):
        plan_of(recipe, OPTIONS, tmp_path)
