"""A reward model of another size, tokenizer and template is trained, serves the policy loop, and is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf
from rlhf.errors import ExitCode, UserError
from rlhf.models.load import export
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer
from rlhf.programs import evaluate
from rlhf.rewards.model import RewardModel, load_reward_model
from rlhf.rollout import Prompt, Turn

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads an old name

COLOURS = ["red", "green", "blue", "black", "white", "pink", "grey", "gold"]
# Other words, other separators, and no special token but EOS.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
COMMON = ["tracking.to=[]", "policy.compute_dtype=float32", "checkpoint.every_steps=null", "run.steps=2"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows() -> list[dict[str, Any]]:
    """Three ranked replies to each question: the colour, a polite one, a rude one."""
    found = []
    for index, colour in enumerate(COLOURS):
        question = f"Which colour is {colour}?"
        replies = [f"It is {colour}.", f"Thank you, I like {colour}.", "Go away."]
        for better, worse in ((0, 1), (0, 2), (1, 2)):
            found.append(
                {
                    "prompt": question,
                    "chosen": replies[better],
                    "rejected": replies[worse],
                    "margin": float(worse - better),
                    "subset": "hep-go" if index % 2 else "mine",
                }
            )
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy; a trunk for a reward model 8 × its size with a tokenizer of its own; rows; a template."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_rows(folder / "pairs.jsonl", rows())
    (folder / "other.jinja").write_text(TEMPLATE)
    texts = [text for row in rows() for text in (row["prompt"], row["chosen"])]
    for name, size, vocabulary, corpus in (
        ("policy", {"layers": 1, "hidden_size": 16, "heads": 2}, 300, texts),
        ("trunk", {"layers": 4, "hidden_size": 48, "heads": 2}, 400, texts[::-1] + ["and other merges"] * 9),
    ):
        tokenizer = train_tokenizer(corpus, vocabulary)
        if name == "trunk":
            tokenizer.chat_template = TEMPLATE
        model = build_causal_lm(build_config("gemma", vocab_size=len(tokenizer), **size), seed=0)  # type: ignore[arg-type]
        export(model, tokenizer, folder / name, stop_ids=(1, 5), card="")
    (folder / "r.yaml").write_text(
        "objective: reward\nrun: {name: rm}\npolicy: {path: trunk}\n"
        "data: {train: [{path: pairs.jsonl, format: chat}], eval: [{path: pairs.jsonl, format: chat}]}\n"
        "optim: {lr: 1.0e-2}\nbatch: {prompts_per_step: 4, microbatch_tokens: 400}\n"
    )
    (folder / "p.yaml").write_text(
        "objective: reinforce\nrun: {name: po}\npolicy: {path: policy}\n"
        "reward: {models: [{path: runs/rm-reward/final}], missing_eos_score: null}\n"
        "data: {train: [{path: pairs.jsonl, format: chat}]}\n"
        "rollout: {samples_per_prompt: 2, max_new_tokens: 6}\nbatch: {prompts_per_step: 2, microbatch_tokens: 400}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert rlhf.train("r.yaml", *COMMON) == ExitCode.DONE
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def metrics(run: str) -> dict[str, float]:
    lines = Path("runs", run, "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def size(path: str) -> int:
    from safetensors import safe_open

    with safe_open(f"{path}/model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_it_is_larger_and_reads_with_its_own_tokenizer() -> None:
    loaded = load_reward_model("runs/rm-reward/final", device="cpu")
    assert size("runs/rm-reward/final") > 8 * size("policy")
    assert loaded.tokenizer.chat_template == TEMPLATE and len(loaded.tokenizer) > 300
    assert metrics("rm-reward")["reward_model/center"] == pytest.approx(loaded.center)


def test_scores_are_those_of_the_unpadded_text() -> None:
    loaded = load_reward_model("runs/rm-reward/final", device="cpu")
    prompts = [Prompt(row_id=i, turns=(Turn(role="user", content="Why? " * (i + 1)),)) for i in range(6)]
    texts = ["It is blue. " * (6 - i) for i in range(6)]
    together = loaded.score_texts(prompts, texts)
    alone = torch.cat([loaded.score_texts([prompt], [text]) for prompt, text in zip(prompts, texts, strict=True)])
    assert float(together.std()) > 1e-3
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)
    parts = ("<bos>[user] Why? <eos> [assistant] ", texts[0], "<eos>")  # a completion never merges with its prompt
    ids = [token for part in parts for token in loaded.tokenizer.encode(part, add_special_tokens=False)]
    with torch.no_grad():
        model: Any = loaded.model
        by_hand = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state)[0, -1, 0] - loaded.center
    assert float(alone[0]) == pytest.approx(float(by_hand), abs=1e-6)


def test_it_serves_the_policy_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf.train("p.yaml", *COMMON) == ExitCode.DONE
    assert metrics("po-reinforce")["reward/rm-reward_mean"] < 1e6
    assert "remark: reward model" not in capsys.readouterr().out


def test_a_smaller_reward_model_is_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    again = ["run.name=smaller", "policy.path=trunk", "reward.models.0.path=runs/small-reward/final"]
    assert rlhf.train("r.yaml", *COMMON, "run.name=small", "policy.path=policy") == ExitCode.DONE
    assert rlhf.train("p.yaml", *COMMON, *again) == ExitCode.DONE
    assert "remark: reward model small-reward has " in capsys.readouterr().out


def test_a_template_of_the_recipe_is_kept_with_the_model() -> None:
    changes = ["run.name=templated", "policy.path=policy", "policy.chat_template=other.jinja", "run.steps=1"]
    assert rlhf.train("r.yaml", *COMMON, *changes) == ExitCode.DONE
    assert load_reward_model("runs/templated-reward/final", device="cpu").tokenizer.chat_template == TEMPLATE


def test_lora_from_the_recipe_and_back() -> None:
    changes = ["run.name=lora", "policy.lora={r: 4}", "reward_model.pairs_per_prompt=2", "reward_model.margin=none"]
    assert rlhf.train("r.yaml", *COMMON, *changes) == ExitCode.DONE
    loaded = load_reward_model("runs/lora-reward/final", device="cpu")
    names = [name for name, _ in loaded.model.named_parameters()]
    assert not any("lora" in name for name in names) and "score.weight" in names
    # the same rows, the same way: what the loaded folder says is what training measured
    figures = evaluated("runs/lora-reward")["figures"]
    trained = metrics("lora-reward")
    for name in ("eval/accuracy", "eval/margin", "eval/length_correlation", "eval/calibration_error"):
        assert figures[name] == pytest.approx(trained[name], abs=1e-6), name


def evaluated(target: str, *overrides: str, **options: Any) -> dict[str, Any]:
    assert evaluate.main(target, overrides, **options) == ExitCode.DONE
    found = options.get("output") or Path(target, "evaluation.json")
    parsed: dict[str, Any] = json.loads(found.read_text())
    return parsed


def test_evaluate_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated("runs/rm-reward")
    assert found["model"] == "runs/rm-reward/final" and found["figures"]["eval/pairs"] == 24
    assert found["figures"]["eval/score_mean"] + metrics("rm-reward")["reward_model/center"] == pytest.approx(
        metrics("rm-reward")["eval/score_mean"], abs=1e-5
    )
    assert found["by"]["subset"]["mine"]["pairs"] == 12  # rows with `subset` are shown by it without being asked
    assert found["sections"]["Reasoning"]["accuracy"] == found["by"]["subset"]["hep-go"]["accuracy"]
    shown = capsys.readouterr().out
    assert "24 pairs" in shown and "prefer the longer one" in shown and "by section" in shown
    assert "figures: runs/rm-reward/evaluation.json" in shown


def test_evaluate_other_rows_of_a_bare_folder(tmp_path: Path) -> None:
    shutil.copytree("runs/rm-reward/final", tmp_path / "bare")
    write_rows(
        tmp_path / "reviews.jsonl",
        [{"text": f"I like {c}.", "label": 1} for c in COLOURS] + [{"text": "Go.", "label": 0}] * 3,
    )
    found = evaluated(str(tmp_path / "bare"), data=[str(tmp_path / "reviews.jsonl")])
    assert found["figures"]["eval/pairs"] == 3 and 0 <= found["figures"]["eval/auc"] <= 1
    model = load_reward_model(str(tmp_path / "bare"), device="cpu")
    assert found["figures"]["eval/auc"] == pytest.approx(_all_pairs(model))  # all 8 × 3, not the 3 pairs
    evaluated("runs/rm-reward/final", output=tmp_path / "mine.json")


def _all_pairs(model: RewardModel) -> float:
    texts = [*(f"I like {colour}." for colour in COLOURS), "Go."]
    *good, bad = model.score_texts([Prompt(row_id=0)] * len(texts), texts).tolist()
    return sum((score > bad) + 0.5 * (score == bad) for score in good) / len(good)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/rm-rewart"], "did you mean runs/rm-reward?"),
        (["runs/rm-reward", "--data", "pears.jsonl"], "did you mean pairs.jsonl?"),
        (["runs/rm-reward", "--by", "topic"], "--by topic: the rows have no such column; they have margin, subset"),
        (["trunk"], "no rows to evaluate on; name some with --data"),
        (["trunk", "--data", "pairs.jsonl", "data.eval.0.format=chat"], "has 2 outputs (num_labels)"),
        (["runs/rm-reward", "kl.betta=1"], "did you mean beta?"),
        (["./"], "neither a run nor a model folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf.cli import main

    monkeypatch.setattr("sys.argv", ["rlhf", "evaluate", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_a_policy_run_is_told_where_its_figures_are(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "recipe.yaml").write_text(Path("p.yaml").read_text())
    with pytest.raises(UserError, match="objective reinforce, and this version evaluates reward models only"):
        evaluate.main(str(tmp_path))
