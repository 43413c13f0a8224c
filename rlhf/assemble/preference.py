"""Recipe → a run on the pairs of the data: offline DPO. Held-out prompts are sampled and judged as for any policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from rlhf.assemble import data, models, policy, rewards
from rlhf.assemble.job import Job
from rlhf.assemble.supervised import shuffled_pairs
from rlhf.data.examples import Preference
from rlhf.models.layout import Layout
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import AdapterOffReference, FrozenReference, Reference
from rlhf.objectives.dpo import PairObjective
from rlhf.programs import scoring, streams
from rlhf.programs import supervised as program
from rlhf.programs.reference_cache import ReferenceCache, weights_digest
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.rollout import Prompt
from rlhf.runtime import distributed
from rlhf.runtime.updater import PolicyForward


def build(recipe: Recipe, session: Session) -> Job:
    """Pairs of ``data.train``; prompts of ``data.eval``, where there is a reward to judge completions with."""
    runtime, size = session.runtime, recipe.batch.prompts_per_step
    models.refuse_what_needs_whole_weights(recipe, runtime)
    own = runtime.share(size, "prompts")
    tokenizer = models.tokenizer_of(recipe)
    pairs, report = data.preferences(recipe, recipe.data.train, tokenizer)
    data.tell(session.note, "data.train", report)
    prompts = streams.by_prompt(pairs)
    steps = recipe.run.steps or math.ceil(len(prompts) / size)
    scores = rewards.reward_set(recipe, runtime, session.note, steps=steps)
    judges = rewards.with_judges(recipe, runtime, scores, session.note, steps=steps)
    held_out = _held_out(recipe, session, tokenizer, pairs) if judges.models or judges.functions else []
    trained = models.scored(recipe, runtime, models.causal_lm(recipe, tokenizer, runtime.device))
    anchor: Reference | None = models.reference(recipe, trained, runtime)
    wrapped, optimizer = distributed.prepare(runtime, trained, models.adamw(recipe, trained))
    anchor = anchor or AdapterOffReference(wrapped, trained)
    stream = shuffled_pairs(recipe, tokenizer, prompts, own)
    layout = models.layout(recipe, trained, anchor)
    objective = cast(PairObjective, policy.objective(recipe))
    run = program.SupervisedRun(
        session=session,
        model=wrapped,
        objective=objective,
        updater=models.updater(recipe, runtime, wrapped, optimizer, PolicyForward(anchor, layout), steps, layout),
        batches=(
            _with_reference(recipe, session, stream, anchor, layout, wrapped, steps)
            if "reference" in objective.needs
            else stream
        ),
        steps=steps,
        eval_every=0,
        evaluate=lambda model: {},
        batch_metrics=lambda batch, stats: scoring.preference_metrics(batch, stats, objective, runtime),
        evaluation=policy.evaluation(recipe, session, tokenizer, wrapped, anchor, judges, held_out, steps),
    )
    return Job(train=partial(program.train, run), model=wrapped, optimizer=optimizer, tokenizer=tokenizer, steps=steps)


def _held_out(recipe: Recipe, session: Session, tokenizer: Any, pairs: Sequence[Preference]) -> list[Prompt]:
    """Prompts to sample at and judge; what is trained on as well is told."""
    if not recipe.data.eval:
        return []
    found, report = data.prompts(recipe, recipe.data.eval, tokenizer)
    data.tell(session.note, "data.eval", report)
    data.tell_overlap(session.note, pairs, found)
    return found[: recipe.eval.samples]


def _with_reference(
    recipe: Recipe,
    session: Session,
    pairs: streams.ShuffledPairs,
    anchor: Reference,
    layout: Layout,
    wrapped: nn.Module,
    steps: int,
) -> ReferenceCache:
    """The pairs with log π_ref, which is computed here unless it lies beside the runs already."""
    runtime = session.runtime
    cache = ReferenceCache(pairs, anchor, recipe.batch.microbatch_tokens, runtime, layout)
    with runtime.gathered(wrapped):
        scored = anchor.model if isinstance(anchor, FrozenReference) else distributed.unwrap(wrapped)
        weights = weights_digest(cast(ScoredModel, scored).causal_lm, models.compute_dtype(recipe))
    cache.fill(Path(recipe.output_dir).parent / ".reference", weights, steps, session.note)
    return cache
