"""RLHF post-training centred on REINFORCE.

>>> from rlhf import Recipe, train
>>> train("quickstart/reinforce", "kl.beta=0.1")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.errors import ExitCode
    from rlhf.recipe import Recipe

__all__ = ["Recipe", "train"]


def train(recipe: Recipe | str, *overrides: str) -> ExitCode:
    """Trains a recipe: an object, a file or a shipped name, with overrides like ``"kl.beta=0.1"``.

    Returns how the run ended. Raises ``rlhf.errors.UserError`` where the recipe cannot work.
    """
    from rlhf.recipe import load_recipe, override

    ready = load_recipe(recipe, overrides) if isinstance(recipe, str) else override(recipe, overrides)
    from rlhf.programs import launch

    return launch.train(ready, ["rlhf", "train", recipe if isinstance(recipe, str) else ready.run.name, *overrides])


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import rlhf.maths` must not need pydantic, nor a recipe torch.
    if name == "Recipe":
        from rlhf.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
