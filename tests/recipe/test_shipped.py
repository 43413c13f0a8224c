"""What ships agrees with the code: recipes, the editors' schema, names that the schema repeats."""

from __future__ import annotations

import typing
from importlib import import_module
from pathlib import Path

import pytest

from rlhf.data.formats import FORMATS
from rlhf.locate import shipped_recipes
from rlhf.objectives import reinforce
from rlhf.objectives.presets import NOT_IN_THIS_VERSION, OBJECTIVES, POLICY_SECTIONS, preset
from rlhf.recipe import Recipe, ignored_sections, load_recipe
from rlhf.recipe.schema import json_schema
from rlhf.recipe.sections import Baseline, KnownFormat
from rlhf.recipe.wording import SYNONYMS
from tests.recipe.conftest import model_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_once_its_inputs_are_there(name: str, place: Path) -> None:
    for made in shipped_recipes():
        model_folder(place / "runs" / made.replace("/", "-") / "final")
    ready = load_recipe(name)
    assert ignored_sections(ready) == []
    header = shipped_recipes()[name].read_text(encoding="utf-8")
    assert f"rlhf train recipes/{name}.yaml" in header and "Hardware:" in header


def test_the_outcome_of_one_recipe_is_the_input_of_the_next(place: Path) -> None:
    """Without the first run, the second names the command that makes its input (and so the swap stays possible)."""
    with pytest.raises(Exception, match="quickstart/sft") as caught:
        load_recipe("quickstart/reinforce")
    assert len(str(caught.value).split("\n")) == 2


def test_the_editors_schema_is_fresh() -> None:
    stored = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert stored == json_schema(), "run `make schema`"


def test_every_key_says_what_it_is() -> None:
    from rlhf.recipe.validate import _walk

    silent = [
        f"{section}.{name}"
        for section, model in _walk(Recipe, "")
        for name, field in model.model_fields.items()
        if section and not field.description
    ]
    assert silent == []


def test_names_that_the_schema_repeats() -> None:
    """The recipe phase cannot import these lists from where torch is needed."""
    assert typing.get_args(Baseline) == typing.get_args(reinforce.Baseline)
    assert typing.get_args(KnownFormat) == FORMATS


def test_presets_name_classes_and_sections_that_exist() -> None:
    for name, entry in OBJECTIVES.items():
        module, _, attribute = entry.target.partition(":")
        objective = getattr(import_module(module), attribute)(**({"name": name} if entry.settings is not None else {}))
        assert objective.name == name
        pinned = {key.partition(".")[2]: value for key, value in entry.pins.items()}
        assert all(hasattr(objective, key) for key in pinned)
        assert entry.sections is not None and entry.sections <= set(Recipe.model_fields)
    assert not NOT_IN_THIS_VERSION & set(OBJECTIVES)
    assert set(POLICY_SECTIONS) <= set(Recipe.model_fields)
    assert preset("a.b:C").program == "policy"


def test_synonyms_lead_to_keys() -> None:
    for target in SYNONYMS.values():
        section, _, key = target.rpartition(".")
        fields = Recipe.model_fields if not section else type(getattr(_any_recipe(), section)).model_fields
        assert key in fields, target


def _any_recipe() -> Recipe:
    return Recipe.model_validate({"objective": "sft", "run": {"name": "x"}})
