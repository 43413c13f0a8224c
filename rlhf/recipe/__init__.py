"""The recipe: schema, loader and rules. Nothing here imports torch, so that a broken recipe is answered at once."""

from rlhf.recipe.load import load_recipe, override
from rlhf.recipe.paths import local_inputs
from rlhf.recipe.reading import ignored_sections
from rlhf.recipe.remarks import remarks
from rlhf.recipe.schema import Recipe

__all__ = ["Recipe", "ignored_sections", "load_recipe", "local_inputs", "override", "remarks"]
