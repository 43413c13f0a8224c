"""Rules between keys, each with its reason: the objective, the run, evaluation, rows.

A rule looks only at what the objective reads: sections of other objectives may hold anything the schema allows.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.objectives.presets import NOT_IN_THIS_VERSION, OBJECTIVES, is_dotted
from rlhf.recipe.marks import Problem
from rlhf.recipe.reading import on_policy
from rlhf.recipe.schema import Recipe
from rlhf.recipe.validate import Rule, registrar
from rlhf.recipe.wording import near, shown

RULES: list[Rule] = []
rule = registrar(RULES)

# What an evaluation of each objective writes (docs/metrics.md), beside the scores of every source.
_EVALUATED = {
    "reinforce": ("eval/reward_mean", "eval/kl_reference", "eval/length_mean", "eval/eos_rate"),
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/margin", "eval/score_mean"),
}


@rule
def objective_is_known(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.objective
    if name in OBJECTIVES or is_dotted(name):
        return
    known = f"{' | '.join(OBJECTIVES)}, or your own as package.module:Class"
    if name in NOT_IN_THIS_VERSION:
        yield Problem(("objective",), f"{name} is not in this version; use {known}")
        return
    close = near(name, OBJECTIVES, cutoff=0.5)
    hint = f"did you mean {close}? " if close else ""
    yield Problem(("objective",), f"unknown objective {shown(name)}; {hint}Known: {known}")


@rule
def name_is_no_folder_reference(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.run.name.strip("."):
        yield Problem(("run", "name"), f"{shown(recipe.run.name)} means a folder, not a name; use letters or digits")


@rule
def nothing_is_pushed(recipe: Recipe) -> Iterator[Problem]:
    if recipe.checkpoint.hub_id is not None:
        yield Problem(
            ("checkpoint", "hub_id"),
            "pushing is not in this version; set null and upload `final/` when you are content",
        )


@rule
def the_best_can_be_found(recipe: Recipe) -> Iterator[Problem]:
    """The best of something that is never measured would be nothing, and nobody would notice."""
    name = recipe.eval.keep_best
    if name is None:
        return
    if not recipe.data.eval or recipe.eval.every_steps is None:
        missing = "data.eval is empty" if not recipe.data.eval else "eval.every_steps is null"
        yield Problem(("eval", "keep_best"), f"{missing}, so {name} is not measured on the way; set it, or null here")
    known = _EVALUATED.get(recipe.objective, () if not on_policy(recipe) else _EVALUATED["reinforce"])
    judged = [item.call.partition(":")[2] for item in recipe.reward.functions]
    judged += [call.partition(":")[2] for call in recipe.eval.functions]
    names = (*known, *(f"eval/{judge}_mean" for judge in judged))
    models = on_policy(recipe) and (recipe.reward.models or recipe.eval.models)
    if name not in names and not (models and name.endswith("_mean")):
        close = near(name, names)
        hint = f"did you mean {close}? " if close else ""
        yield Problem(("eval", "keep_best"), f"{shown(name)} is not measured; {hint}There are {', '.join(names)}")


@rule
def there_are_rows(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.data.train:
        yield Problem(("data", "train"), "no rows to train on; add `- {path: …}`")


@rule
def prompts_are_cut_from_text_only(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.prompt_tokens is None:
        return
    for index, source in enumerate(recipe.data.train):
        if source.format not in ("auto", "text") and not is_dotted(source.format):
            yield Problem(
                ("data", "prompt_tokens"),
                f"cuts prompts from plain text, and data.train.{index}.format is {shown(source.format)}, whose rows "
                "have prompts of their own; remove one of the two",
            )
