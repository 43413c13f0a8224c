"""Recipe → objects: the only place that knows both. What a key turns into is decided here, once."""

from __future__ import annotations

from rlhf.assemble.job import Job
from rlhf.programs.session import Session
from rlhf.recipe import Recipe

__all__ = ["Job", "build", "program_of"]


def program_of(recipe: Recipe) -> str:
    """``policy``, ``preference``, ``sft`` or ``reward``: which loop runs the objective, and so what its rows are.

    Outside objectives run in the policy loop, and so does ``dpo.online``.
    """
    from rlhf.objectives.presets import OBJECTIVES

    preset = OBJECTIVES.get(recipe.objective)
    if preset is None or (recipe.objective == "dpo" and recipe.dpo.online):
        return "policy"
    return preset.program


def build(recipe: Recipe, session: Session) -> Job:
    """The objective's job, ready to train."""
    from rlhf.assemble import policy, preference, supervised

    program = program_of(recipe)
    if program == "sft":
        return supervised.sft(recipe, session)
    if program == "reward":
        return supervised.reward(recipe, session)
    if program == "preference":
        return preference.build(recipe, session)
    return policy.build(recipe, session)
