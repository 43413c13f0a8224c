"""Recipe → objects: the only place that knows both. What a key turns into is decided here, once."""

from __future__ import annotations

from rlhf.assemble.job import Job
from rlhf.programs.session import Session
from rlhf.recipe import Recipe

__all__ = ["Job", "build", "program_of"]


def program_of(recipe: Recipe) -> str:
    """``policy``, ``sft`` or ``reward``: which loop runs the objective. Outside objectives run in the policy loop."""
    from rlhf.objectives.presets import OBJECTIVES

    preset = OBJECTIVES.get(recipe.objective)
    return preset.program if preset is not None else "policy"


def build(recipe: Recipe, session: Session) -> Job:
    """The objective's job, ready to train."""
    from rlhf.assemble import policy, supervised

    program = program_of(recipe)
    if program == "sft":
        return supervised.sft(recipe, session)
    if program == "reward":
        return supervised.reward(recipe, session)
    return policy.build(recipe, session)
