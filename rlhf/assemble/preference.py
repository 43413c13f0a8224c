"""Recipe → a run on the pairs of the data: offline DPO. Held-out prompts are sampled and judged as for any policy."""

from __future__ import annotations

import math
from functools import partial
from typing import cast

from rlhf.assemble import data, models, policy, rewards
from rlhf.assemble.job import Job
from rlhf.assemble.supervised import epochs
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import AdapterOffReference, Reference
from rlhf.objectives.dpo import Dpo
from rlhf.programs import scoring, streams
from rlhf.programs import supervised as program
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.rollout import Prompt
from rlhf.runtime import distributed
from rlhf.runtime.updater import PolicyForward


def build(recipe: Recipe, session: Session) -> Job:
    """Pairs of ``data.train``; prompts of ``data.eval``, where there is a reward to judge completions with."""
    runtime, size = session.runtime, recipe.batch.prompts_per_step
    models.refuse_unmeasurable_steps(recipe, runtime)
    own = runtime.share(size, "prompts")
    tokenizer = models.tokenizer_of(recipe)
    pairs, report = data.preferences(recipe, recipe.data.train, tokenizer)
    data.tell(session.note, "data.train", report)
    prompts = streams.by_prompt(pairs)
    steps = recipe.run.steps or math.ceil(len(prompts) / size)
    judges = rewards.with_judges(recipe, runtime, rewards.reward_set(recipe, runtime, steps=steps), steps=steps)
    held_out: list[Prompt] = []
    if recipe.data.eval and (judges.models or judges.functions):
        held_out, report = data.prompts(recipe, recipe.data.eval, tokenizer)
        data.tell(session.note, "data.eval", report)
        data.tell_overlap(session.note, pairs, held_out)
    trained = ScoredModel(models.causal_lm(recipe, tokenizer), compute_dtype=models.compute_dtype(recipe))
    anchor: Reference | None = models.reference(recipe, trained, runtime)
    wrapped, optimizer = distributed.prepare(runtime, trained, models.adamw(recipe, trained))
    anchor = anchor or AdapterOffReference(wrapped, trained)
    objective, budget = cast(Dpo, policy.objective(recipe)), recipe.batch.microbatch_tokens
    run = program.SupervisedRun(
        session=session,
        model=wrapped,
        objective=objective,
        updater=models.updater(recipe, runtime, wrapped, optimizer, PolicyForward(anchor), steps),
        batches=streams.PairsWithReference(
            pairs=streams.ShuffledPairs(
                epoch_prompts=epochs(recipe, tokenizer, prompts),
                per_epoch=len(prompts),
                per_step=size,
                seed=recipe.run.seed,
                own=own,
                tokenizer=tokenizer,
            ),
            reference=anchor,
            microbatch_tokens=budget,
            runtime=runtime,
        ),
        steps=steps,
        eval_every=0,
        evaluate=lambda model: {},
        batch_metrics=lambda batch, stats: scoring.preference_metrics(batch, stats, objective, runtime),
        evaluation=policy.evaluation(
            recipe, session, tokenizer, wrapped, anchor, judges, held_out[: recipe.eval.samples], steps
        ),
    )
    return Job(train=partial(program.train, run), model=wrapped, optimizer=optimizer, tokenizer=tokenizer, steps=steps)
