"""Overrides, all errors at once, and what a loaded recipe can say about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.recipe import Recipe, load_recipe, override
from rlhf.recipe.sections import Kl, Run
from tests.recipe.corpus import recipe


def load(*overrides: str, text: str = recipe()) -> Recipe:
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml", overrides)


def refusal(*overrides: str, text: str = recipe()) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    return str(caught.value).split("\n")


@pytest.mark.usefixtures("place")
class TestOverrides:
    def test_scalars_are_read_like_the_yaml(self) -> None:
        changed = load("kl.beta=1e-2", "run.max_seconds=60", "optim.max_grad_norm=null", "sft.packing=true")
        assert (changed.kl.beta, changed.run.max_seconds, changed.optim.max_grad_norm) == (0.01, 60.0, None)
        assert changed.sft.packing is True

    def test_lists_and_sections(self) -> None:
        changed = load(
            "tracking.to=[]",
            "rollout.stop=['\\n', \"=a=\"]",
            'reward.functions=[{call: "json:dumps", weight: 0.5}]',
            "policy.lora={r: 4}",
        )
        assert changed.tracking.to == ()
        assert changed.rollout.stop == ("\\n", "=a=")
        assert (changed.reward.functions[0].call, changed.reward.functions[0].weight) == ("json:dumps", 0.5)
        assert changed.policy.lora is not None and changed.policy.lora.r == 4

    def test_entries_of_lists(self, place: Path) -> None:
        (place / "more.jsonl").write_text('{"prompt": "b"}\n')
        changed = load("data.train.0.path=more.jsonl", "data.train.1.path=rows.jsonl", "data.eval.0.path=rows.jsonl")
        assert [source.path for source in changed.data.train] == ["more.jsonl", "rows.jsonl"]
        assert changed.data.eval[0].path == "rows.jsonl"

    @pytest.mark.parametrize("name", ["7", "1e6", "true", "2026-01-02", "no", "010"])
    def test_a_name_is_taken_as_typed(self, name: str) -> None:
        """A shell loop over seeds or dates should not need quotes within quotes."""
        assert load(f"run.name={name}").run.name == name

    def test_an_equals_sign_in_the_value(self) -> None:
        assert load("data.train.0.split=train[:5]=x").data.train[0].split == "train[:5]=x"

    def test_they_mend_what_the_file_has_wrong(self) -> None:
        assert load("run.name=ok", text=recipe(run="run: {name: no, steps: 3}")).run.name == "ok"

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("kl.betta=1", "override kl.betta: unknown key 'betta'; did you mean beta?"),
            ("lr=1", "override lr: unknown key 'lr' here; it belongs under value: or optim:"),
            ("kl.beta=high", "override kl.beta: must be a number, not 'high' (text)"),
            ("kl.estimator=k2", "override kl.estimator: must be k1 | exact, not 'k2'; did you mean k1?"),
            (
                "data.train.5.path=x",
                "override data.train.5.path: data.train has 1 entries; the next one is data.train.1",
            ),
            (
                "data.train.path=x",
                "override data.train.path: data.train is a list of 1; name the entry by number, like",
            ),
            ("objective.name=x", "override objective.name: objective is 'reinforce', which has no keys"),
            ("kl.beta", "override 'kl.beta': an override is key=value, like kl.beta=0.1"),
            ("--kl.beta=1", "override 'kl.beta': an override is key=value, like kl.beta=0.1, without dashes"),
            ("=1", "override '=1': an override is key=value"),
            ("kl..beta=1", "override 'kl..beta': an override is key=value"),
            ("tracking.to=[", "override tracking.to: value:1: not YAML"),
            ("rollout.samples_per_prompt=1", "override rollout.samples_per_prompt: 1 leaves nothing to compare"),
        ],
    )
    def test_refusals_name_the_override(self, given: str, said: str) -> None:
        lines = refusal(given)
        assert len(lines) == 1 and lines[0].startswith(said)


@pytest.mark.usefixtures("place")
def test_schema_errors_and_broken_rules_come_together() -> None:
    text = recipe(
        run="run: {name: a/b, stesp: 3}",
        policy=None,
        data="data: {train: [{path: none.jsonl}]}",
        kl="kl: {beta: high, target: 3}",
        rollout="rollout: {samples_per_prompt: 1}",
    )
    lines = refusal("optim.lr=-1", text=text)
    assert [line.split(": ")[0:2] for line in lines] == [
        ["r.yaml:1", "policy"],  # a rule, asked for by the objective
        ["r.yaml:2", "run.name"],  # schema
        ["r.yaml:2", "run.stesp"],
        ["r.yaml:4", "data.train.0.path"],  # the disk
        ["r.yaml:5", "kl.beta"],
        ["r.yaml:5", "kl.target"],  # a rule of a section with an error
        ["r.yaml:6", "rollout.samples_per_prompt"],
        ["override optim.lr", "should be greater than 0, not -1"],
    ]


@pytest.mark.usefixtures("place")
def test_a_rule_says_nothing_about_a_value_that_is_itself_wrong() -> None:
    lines = refusal(text=recipe(rollout="rollout: {samples_per_prompt: one}"))
    assert len(lines) == 1 and "must be a whole number" in lines[0]


@pytest.mark.usefixtures("place")
def test_paths_and_names_of_recipes() -> None:
    with pytest.raises(UserError, match=r"did you mean quickstart/sft\?"):
        load_recipe("quickstart/sfft")
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        load_recipe("model")
    assert load_recipe("quickstart/sft").objective == load_recipe("recipes/quickstart/sft.yaml").objective == "sft"


@pytest.mark.usefixtures("place")
def test_the_run_directory_is_filled_in() -> None:
    assert load().output_dir == Path("runs/x-reinforce")
    assert load("run.output_dir=/data/{objective}/{name}").output_dir == Path("/data/reinforce/x")
    outside = load("objective=json.decoder:JSONDecoder")
    assert outside.output_dir == Path("runs/x-json.decoder-JSONDecoder")  # a folder, not a drive or a port


@pytest.mark.usefixtures("place")
def test_differences_name_every_key_with_both_values() -> None:
    mine = load()
    theirs = load("kl.beta=0.1", "data.eval.0.path=rows.jsonl", "policy.lora={}")
    found = mine.differences(theirs)
    assert found["kl.beta"] == (0.05, 0.1)
    assert found["data.eval.0.path"] == (None, "rows.jsonl")
    assert found["policy.lora.r"] == (None, 16)
    assert {key.split(".")[0] for key in found} == {"kl", "data", "policy"}
    assert mine.differences(load()) == {}


@pytest.mark.usefixtures("place")
def test_a_resolved_recipe_reads_back_whatever_its_texts_look_like() -> None:
    ready = load('run.name="1e6"', "rollout.stop=['no', '010', 'a: b', '2026-01-02', '', 'ü']", "optim.lr=1e-7")
    Path("resolved.yaml").write_text(ready.to_yaml(), encoding="utf-8")
    assert load_recipe("resolved.yaml") == ready


@pytest.mark.usefixtures("place")
def test_recipes_made_in_python_obey_the_same_rules() -> None:
    made = Recipe(objective="sft", run=Run(name="x"), kl=Kl(beta=0.1))
    with pytest.raises(UserError) as caught:
        override(made, ["policy.path=model"])
    assert str(caught.value) == "recipe: data.train: no rows to train on; add `- {path: …}`"
    assert override(made, ["policy.path=model", "data.train.0.path=rows.jsonl"]).kl.beta == 0.1
    with pytest.raises(ValueError, match="frozen"):
        made.run.seed = 3
