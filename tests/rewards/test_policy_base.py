"""A reward model as another adapter on the policy's base: scores of the whole model, a policy left as it was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.interfaces import StatsRequest
from rlhf.models import adapters
from rlhf.models.layout import plain_rows
from rlhf.models.load import LoraSpec, add_lora, export, load_causal_lm, merged_state
from rlhf.models.policy import ScoredModel, token_stats
from rlhf.models.reference import AdapterOffReference
from rlhf.models.scratch import build_causal_lm, build_config
from rlhf.objectives.reinforce import Reinforce
from rlhf.rewards.model import RewardModel, load_reward_model
from rlhf.rewards.policy_base import reward_model_beside
from rlhf.rollout import Prompt, Turn
from rlhf.runtime import training_state
from rlhf.runtime.fingerprint import fingerprint
from rlhf.runtime.updater import Term
from tests.models.test_reward_lora import TEXTS, TOKENIZER, trained
from tests.support import alone, fixed_rollout, prepared, updater, with_reference

# peft reads an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

EVERY, SOME, OTHERS = "all-linear", ("q_proj", "v_proj"), ("up_proj", "o_proj")
TARGETS = [(EVERY, EVERY), (SOME, EVERY), (EVERY, SOME), (SOME, OTHERS)]  # of the policy, of the reward model
PROMPTS = [Prompt(row_id=i, turns=(Turn(role="user", content=text),)) for i, text in enumerate(TEXTS)]
ASKED = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]]  # three of one prompt share a row
ANSWERS = ["Paris.", "I do not care.", "What?", "The capital of France is Paris.", ""]
FINISHED = [True, True, False, True, True]


def write_base(path: Path, seed: int = 0) -> Path:
    config = build_config("gemma", layers=2, hidden_size=32, heads=2, vocab_size=len(TOKENIZER))
    export(build_causal_lm(config, seed=seed), TOKENIZER, path, stop_ids=(1, 5), card="")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "final")


def write_judge(base: Path, path: Path, targets: Any = EVERY) -> Path:
    """``final/`` of a LoRA reward model, as a run writes it."""
    _, peft = trained(str(base), targets, steps=8)
    peft.get_base_model().config.reward_center = 0.25

    def beside(staging: Path) -> None:
        adapters.keep(peft, staging, fingerprint(base))

    export(peft, TOKENIZER, path, stop_ids=(), card="", merge=True, extra=beside)
    return path


@pytest.fixture(scope="module")
def judge(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(base, tmp_path_factory.mktemp("judge") / "final")


@dataclass(frozen=True)
class Together:
    """A policy whose adapter has moved, and a reward model on its base."""

    policy: ScoredModel
    judge: RewardModel

    @property
    def peft(self) -> Any:
        return self.policy.causal_lm

    @property
    def reference(self) -> AdapterOffReference:
        return AdapterOffReference(self.policy, self.policy)

    def logprobs(self) -> Tensor:
        return token_stats(self.policy, plain_rows(fixed_rollout()), StatsRequest()).logprobs.detach()

    def reference_logprobs(self) -> Tensor:
        return self.reference.stats(plain_rows(fixed_rollout()), StatsRequest()).logprobs

    def score(self) -> Tensor:
        return self.judge.score_texts(ASKED, ANSWERS, FINISHED)


def moved_policy(base: Path, targets: Any = EVERY) -> Any:
    lm = add_lora(load_causal_lm(str(base)), LoraSpec(r=4, alpha=8.0, targets=targets), 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


def together(base: Path, judge: Path, targets: Any = EVERY) -> Together:
    lm = moved_policy(base, targets)
    beside = reward_model_beside(str(judge), lm, adapter="reward_0", microbatch_tokens=512)
    return Together(ScoredModel(lm), beside)


def state(peft: Any) -> tuple[Any, ...]:
    """What scoring could leave behind."""
    return (
        peft.active_adapter,
        [getattr(module, "active_adapters", None) for module in peft.modules()],
        [module.training for module in peft.modules()],
        {name: parameter.requires_grad for name, parameter in peft.named_parameters()},
    )


@pytest.mark.parametrize(("of_policy", "of_judge"), TARGETS)
def test_scores_are_those_of_the_whole_model(base: Path, tmp_path: Path, of_policy: Any, of_judge: Any) -> None:
    path = write_judge(base, tmp_path / "final", of_judge)
    both, whole = together(base, path, of_policy), load_reward_model(str(path), device="cpu")
    expected = whole.score_texts(ASKED, ANSWERS, FINISHED)
    assert both.judge.center == whole.center == 0.25 and both.judge.name == whole.name
    assert float((both.score() - expected).abs().max()) <= 1e-5  # W·x + s·B·A·x against (W + s·B·A)·x in float32
    assert float(expected.max() - expected.min()) > 1e-2
    with both.peft.disable_adapter():  # the reward model's adapter matters, or nothing was compared
        assert float((both.judge.forward(both.judge.render(ASKED, ANSWERS, FINISHED)) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(("of_policy", "of_judge"), TARGETS)
def test_the_policy_is_left_as_it_was(base: Path, tmp_path: Path, of_policy: Any, of_judge: Any) -> None:
    """Log-probabilities of policy and reference to the last bit, as if no reward model had ever been there."""
    lone = ScoredModel(moved_policy(base, of_policy))
    both = together(base, write_judge(base, tmp_path / "final", of_judge), of_policy)
    both.peft.train()
    both.peft.get_base_model().model.layers[0].eval()  # a mode of its own comes back too
    before, own, reference = state(both.peft), both.logprobs(), both.reference_logprobs()
    assert torch.equal(own, token_stats(lone, plain_rows(fixed_rollout()), StatsRequest()).logprobs.detach())
    both.score()
    assert state(both.peft) == before
    assert torch.equal(both.logprobs(), own) and torch.equal(both.reference_logprobs(), reference)
    assert {n for n, p in both.peft.named_parameters() if p.requires_grad} == {
        n for n, p in lone.causal_lm.named_parameters() if p.requires_grad
    }


def test_the_policy_is_left_as_it_was_where_scoring_fails(base: Path, judge: Path) -> None:
    both = together(base, judge)
    before, own = state(both.peft), both.logprobs()
    with pytest.raises(IndexError):
        both.judge.score_rows([PROMPTS[0]], [[10**6]])  # an id without an embedding
    assert state(both.peft) == before and torch.equal(both.logprobs(), own)


def test_the_base_is_there_once(base: Path, judge: Path) -> None:
    both = together(base, judge)
    base_weights = {p.data_ptr() for n, p in both.peft.named_parameters() if "lora_" not in n}
    own = {p.data_ptr(): p.numel() for p in both.judge.model.parameters() if p.data_ptr() not in base_weights}
    adapter = {p.data_ptr(): p.numel() for n, p in both.peft.named_parameters() if "lora_" in n}
    assert sum(own.values()) - sum(adapter.values()) == 32  # the head
    assert not any(p.requires_grad for n, p in both.judge.model.named_parameters() if ".reward_0." in n or "score" in n)


def test_the_random_state_is_left_as_it_was(base: Path, judge: Path) -> None:
    lm = moved_policy(base)
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    reward_model_beside(str(judge), lm, adapter="reward_0")
    assert torch.equal(torch.rand(()), expected)


def test_several_reward_models_share_a_base(base: Path, judge: Path, tmp_path: Path) -> None:
    lm = moved_policy(base)
    paths = [judge, write_judge(base, tmp_path / "final", SOME)]
    beside = [reward_model_beside(str(path), lm, adapter=f"reward_{at}") for at, path in enumerate(paths)]
    for path, found in zip(paths, beside, strict=True):
        expected = load_reward_model(str(path), device="cpu").score_texts(ASKED, ANSWERS, FINISHED)
        assert float((found.score_texts(ASKED, ANSWERS, FINISHED) - expected).abs().max()) <= 1e-5


def gradient(model: ScoredModel, reference: AdapterOffReference) -> Tensor:
    """One step of SGD with learning rate 1."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    goal = Reinforce(beta=0.3)
    batch = prepared(with_reference(fixed_rollout(), cast(Any, reference)), goal)
    assert updater(model, cast(Any, reference)).step([Term(objective=goal, batch=batch)], 1).applied
    return torch.cat([(model.get_parameter(name).detach() - before[name]).flatten() for name in sorted(names)])


def test_the_gradient_is_that_of_a_policy_alone(base: Path, judge: Path) -> None:
    lone, both = ScoredModel(moved_policy(base)), together(base, judge)
    both.score()
    frozen = {n: p.detach().clone() for n, p in both.peft.named_parameters() if not p.requires_grad}
    expected = gradient(lone, AdapterOffReference(lone, lone))
    assert torch.equal(gradient(both.policy, both.reference), expected)
    assert float(expected.norm()) > 1e-2
    assert all(torch.equal(both.peft.get_parameter(name), value) for name, value in frozen.items())


@pytest.mark.parametrize(("of_policy", "of_judge"), TARGETS)
def test_nothing_of_it_is_saved_or_pushed(base: Path, tmp_path: Path, of_policy: Any, of_judge: Any) -> None:
    """Checkpoints, ``final/``, and the merged weights that an engine is given: those of the policy alone."""
    lone = ScoredModel(moved_policy(base, of_policy))
    both = together(base, write_judge(base, tmp_path / "final", of_judge), of_policy)
    saved = []
    for model in (lone, both.policy):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        saved.append(training_state.collect(alone(), model, optimizer))
    assert [sorted(files["model"]) for files in saved] == 2 * [sorted(saved[0]["model"])]
    assert [sorted(files["optimizer"]) for files in saved] == 2 * [sorted(saved[0]["optimizer"])]
    merged = [merged_state(model.causal_lm) for model in (lone, both.policy)]
    assert sorted(merged[0]) == sorted(merged[1]) and all(torch.equal(v, merged[1][n]) for n, v in merged[0].items())
    for name, model in (("lone", lone), ("both", both.policy)):
        export(model.causal_lm, TOKENIZER, tmp_path / name, stop_ids=(1, 5), card="")
    assert {p.name for p in (tmp_path / "lone").iterdir()} == {p.name for p in (tmp_path / "both").iterdir()}
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("lone", "both")]
    assert weights[0] == weights[1]


def test_a_moved_copy_of_the_base_is_the_base(base: Path, judge: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("told anew")
    adapters.refuse_another_base(str(judge), str(tmp_path / "elsewhere"), "reward.models.0.path")


def test_another_base_is_refused(base: Path, judge: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"reward\.models\.0\.path=.*was trained on .*, and policy\.path=.* is another"):
        adapters.refuse_another_base(str(judge), str(other), "reward.models.0.path")
    with pytest.raises(UserError, match=r"policy\.path=google/gemma-2-2b is another"):
        adapters.refuse_another_base(str(judge), "google/gemma-2-2b", "reward.models.0.path")
    with pytest.raises(UserError, match="holds no adapter/"):
        adapters.refuse_another_base(str(base), str(base), "reward.models.0.path")
    policy = tmp_path / "policy"
    export(moved_policy(base), TOKENIZER, policy, stop_ids=(), card="")
    with pytest.raises(UserError, match="is an adapter too"):
        adapters.refuse_another_base(str(judge), str(policy), "reward.models.0.path")


def test_a_base_that_changed_under_its_name_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    judge = write_judge(base, tmp_path / "judge")
    adapters.refuse_another_base(str(judge), str(base), "key")
    shutil.rmtree(base)
    write_base(base, seed=1)
    with pytest.raises(UserError, match="which has changed since"):
        adapters.refuse_another_base(str(judge), str(base), "key")


@pytest.mark.parametrize(("layers", "width"), [(1, 32), (2, 16)], ids=["fewer layers", "narrower"])
def test_an_adapter_that_does_not_fit_is_refused(judge: Path, layers: int, width: int) -> None:
    config = build_config("gemma", layers=layers, hidden_size=width, heads=2, vocab_size=len(TOKENIZER))
    other = add_lora(build_causal_lm(config, seed=0), LoraSpec(r=4, alpha=8.0), 3)
    with pytest.raises(UserError, match="does not fit the policy's base"):
        reward_model_beside(str(judge), other, adapter="reward_0")


def test_more_outputs_than_one_are_refused(base: Path, judge: Path, tmp_path: Path) -> None:
    shutil.copytree(judge, tmp_path / "two")
    config = tmp_path / "two" / "config.json"
    text = config.read_text(encoding="utf-8").rstrip().removesuffix("}").rstrip()
    config.write_text(text + ', "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}', encoding="utf-8")
    with pytest.raises(UserError, match="has 2 outputs"):
        reward_model_beside(str(tmp_path / "two"), moved_policy(base), adapter="reward_0")
