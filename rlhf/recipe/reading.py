"""What an objective reads of a recipe: its sections, its loop, its reward models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from rlhf.objectives.presets import OBJECTIVES, Program, is_dotted, preset
from rlhf.recipe.marks import KeyPath
from rlhf.recipe.schema import Recipe
from rlhf.recipe.sections import RewardSource


def ignored_sections(recipe: Recipe) -> list[str]:
    """Sections that the recipe sets and its objective does not read, in the order of the schema."""
    return [name for name in type(recipe).model_fields if name in recipe.model_fields_set and not reads(recipe, name)]


def reads(recipe: Recipe, section: str) -> bool:
    """Whether the objective reads this section. An unknown objective reads none, so that only its name is reported."""
    if section == "objective":
        return True
    if not is_dotted(recipe.objective) and recipe.objective not in OBJECTIVES:
        return False
    sections = preset(recipe.objective).sections
    return sections is None or section in sections


def family(recipe: Recipe) -> bool:
    """Whether the objective is `reinforce` or one of the presets made of it."""
    return recipe.objective in OBJECTIVES and reads(recipe, "reinforce")


def on_policy(recipe: Recipe) -> bool:
    """Whether the objective reads what the loop that samples from the policy does."""
    return reads(recipe, "rollout")


def reward_sources(recipe: Recipe) -> Iterator[tuple[KeyPath, RewardSource]]:
    """Key and entry of every reward model that the objective reads: those of the reward, and held-out judges."""
    if reads(recipe, "reward"):
        for index, model in enumerate(recipe.reward.models):
            yield ("reward", "models", index), model
    if on_policy(recipe):
        for index, judge in enumerate(recipe.eval.models):
            yield ("eval", "models", index), judge


def quantized(recipe: Recipe) -> Iterator[tuple[KeyPath, str | None]]:
    """Section and path of every model that is loaded in fewer bits; a reference without one is the policy's start."""
    if recipe.policy.quantize is not None:
        yield ("policy",), recipe.policy.path
    if recipe.reference.quantize is not None and reads(recipe, "reference"):
        yield ("reference",), recipe.reference.path or recipe.policy.path
    for here, source in reward_sources(recipe):
        if source.quantize is not None:
            yield here, source.path


def program_of(recipe: Recipe) -> Program:
    """Which loop runs the objective, and so what its rows are. Outside objectives run in the policy loop."""
    chosen = preset(recipe.objective)
    if chosen.online and reduce(getattr, chosen.online.split("."), recipe):
        return "policy"
    return chosen.program
