"""Recipe → SFT and reward-model runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from rlhf.assemble import data, models
from rlhf.assemble.job import Job
from rlhf.data.examples import Preference
from rlhf.models.chat import render_completion, render_prompt
from rlhf.models.layout import Layout, PackedRows, plain_rows
from rlhf.models.load import base_model
from rlhf.models.scalar import ScalarModel, scalar_forward
from rlhf.objectives.supervised import BradleyTerry, Demonstrations
from rlhf.programs import reward_figures as figures
from rlhf.programs import scoring, streams
from rlhf.programs import supervised as program
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.runtime import distributed
from rlhf.runtime.updater import PolicyForward


def sft(recipe: Recipe, session: Session) -> Job:
    """Supervised fine-tuning: −log π of given completions, a mean over their tokens."""
    runtime, size = session.runtime, recipe.batch.prompts_per_step
    models.refuse_what_needs_whole_weights(recipe, runtime)
    own = runtime.share(size, "rows")
    tokenizer = models.tokenizer_of(recipe)
    rows, held_out = (
        data.tokenised(recipe, part, tokenizer, session.note)
        for part in data.train_and_eval(data.demonstrations, recipe, session.note, tokenizer)
    )
    steps = recipe.run.steps or recipe.sft.epochs * math.ceil(len(rows) / size)
    policy = models.scored(recipe, runtime, models.causal_lm(recipe, tokenizer, runtime.device))
    wrapped, optimizer = distributed.prepare(runtime, policy, models.adamw(recipe, policy))
    budget = recipe.batch.microbatch_tokens
    layout: Layout = PackedRows() if recipe.sft.packing else plain_rows
    run = program.SupervisedRun(
        session=session,
        model=wrapped,
        objective=Demonstrations(),
        updater=models.updater(recipe, runtime, wrapped, optimizer, PolicyForward(layout=layout), steps, layout),
        batches=streams.ShuffledDemonstrations(rows=rows, per_step=size, seed=recipe.run.seed, own=own),
        steps=steps,
        eval_every=recipe.eval.every_steps or 0,
        evaluate=lambda model: scoring.demonstration_loss(model, held_out, budget, runtime),
        batch_metrics=lambda batch, stats: {},
    )
    return Job(train=partial(program.train, run), model=wrapped, optimizer=optimizer, tokenizer=tokenizer, steps=steps)


def reward(recipe: Recipe, session: Session) -> Job:
    """A Bradley–Terry reward model, centred on the chosen completions' mean score."""
    runtime, size = session.runtime, recipe.batch.prompts_per_step
    own = runtime.share(size, "prompts")
    tokenizer = models.tokenizer_of(recipe)
    pairs, eval_pairs = data.train_and_eval(data.preferences, recipe, session.note, tokenizer)
    prompts, held_out = _prompts(recipe, pairs), figures.held_out(eval_pairs)
    steps = recipe.run.steps or recipe.reward_model.epochs * math.ceil(len(prompts) / size)
    model = ScalarModel(models.classifier(recipe, tokenizer), compute_dtype=models.compute_dtype(recipe))
    wrapped, optimizer = distributed.prepare(runtime, model, models.adamw(recipe, model))
    budget = recipe.batch.microbatch_tokens
    run = program.SupervisedRun(
        session=session,
        model=wrapped,
        objective=BradleyTerry(),
        updater=models.updater(recipe, runtime, wrapped, optimizer, scalar_forward, steps),
        batches=shuffled_pairs(recipe, tokenizer, prompts, own, recipe.reward_model.pairs_per_prompt),
        steps=steps,
        eval_every=recipe.eval.every_steps or 0,
        evaluate=lambda m: scoring.ranking_figures(m, held_out, tokenizer, budget, runtime),
        batch_metrics=lambda batch, stats: scoring.pair_metrics(batch, stats, runtime),  # type: ignore[arg-type]
    )
    center = partial(_center, recipe, session, tokenizer, pairs) if recipe.reward_model.center else _leave
    return Job(
        train=partial(program.train, run),
        model=wrapped,
        optimizer=optimizer,
        tokenizer=tokenizer,
        steps=steps,
        finish=center,
    )


def _prompts(recipe: Recipe, pairs: Sequence[Preference]) -> list[streams.PromptPairs]:
    """Pairs by prompt, with the margins that the recipe wants."""
    if recipe.reward_model.margin == "none":
        pairs = [replace(pair, margin=None) for pair in pairs]
    return streams.by_prompt(pairs)


def shuffled_pairs(
    recipe: Recipe,
    tokenizer: Any,
    prompts: list[streams.PromptPairs],
    own: slice,
    pairs_per_prompt: int | None = None,
) -> streams.ShuffledPairs:
    """The pairs of ``batch.prompts_per_step`` prompts a step, of which this process has ``own``."""
    return streams.ShuffledPairs(
        epoch_prompts=_epochs(recipe, tokenizer, prompts),
        per_epoch=len(prompts),
        per_step=recipe.batch.prompts_per_step,
        seed=recipe.run.seed,
        own=own,
        tokenizer=tokenizer,
        pairs_per_prompt=pairs_per_prompt,
    )


def _epochs(
    recipe: Recipe, tokenizer: Any, first: list[streams.PromptPairs]
) -> Callable[[int], list[streams.PromptPairs]]:
    """epoch → its prompts; labelled text is paired anew each epoch. The last two epochs asked for are kept."""

    @functools.lru_cache(maxsize=2)
    def prompts(epoch: int) -> list[streams.PromptPairs]:
        if epoch == 0:
            return first
        return _prompts(recipe, data.preferences(recipe, recipe.data.train, tokenizer, epoch)[0])

    return prompts


def _leave(model: nn.Module) -> None:
    return None


def _center(recipe: Recipe, session: Session, tokenizer: Any, pairs: Sequence[Preference], model: nn.Module) -> None:
    """Writes ``reward_center`` into the model's config: the mean score of up to 512 chosen completions (InstructGPT and
    Stiennon et al. 2020 shift the model so that reference completions average 0)."""
    rows = [
        (render_prompt(tokenizer, pair.prompt), render_completion(tokenizer, pair.prompt, pair.chosen))
        for pair in pairs[:512]
    ]
    mean = scoring.mean_score(model, rows, recipe.batch.microbatch_tokens, session.runtime)
    classifier: Any = base_model(distributed.unwrap(model).classifier)  # type: ignore[arg-type]
    classifier.config.reward_center = mean
    session.log(session.last_step, {"reward_model/center": mean})
