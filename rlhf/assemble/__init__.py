"""Recipe → objects: the only place that knows both. What a key turns into is decided here, once."""

from __future__ import annotations

from rlhf.assemble.job import Job
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.recipe.reading import program_of

__all__ = ["Job", "build", "program_of"]


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
