"""Recipe → a policy run: sampler, rewards, reference, objective, and the loop's streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, cast

import torch

from rlhf.assemble import data, models, rewards, sampling
from rlhf.assemble.job import Job
from rlhf.errors import UserError
from rlhf.interfaces import PolicyObjective
from rlhf.locate import named_code
from rlhf.models.adapters import TrunkClassifier
from rlhf.models.chat import Dialogue
from rlhf.models.layout import Layout
from rlhf.models.reference import AdapterOffReference, MovingReference, Reference
from rlhf.objectives.presets import preset
from rlhf.objectives.supervised import Demonstrations
from rlhf.programs import policy as program
from rlhf.programs import streams
from rlhf.programs.evaluation import Evaluation
from rlhf.programs.passes import passes_of
from rlhf.programs.session import Session
from rlhf.recipe import Recipe
from rlhf.rewards.combine import RewardSet
from rlhf.rewards.model import RewardModel, short_name
from rlhf.rollout import Prompt
from rlhf.runtime import distributed
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.updater import PolicyForward
from rlhf.sampling.ahead import AheadSampler
from rlhf.sampling.engine import Engine, EngineSampler


def objective(recipe: Recipe) -> PolicyObjective:
    """What the table says; ``package.module:Class`` from outside is given the resolved recipe."""
    chosen = preset(recipe.objective)
    make = named_code(chosen.target, "objective")
    if chosen.settings is None:
        return cast(PolicyObjective, make(recipe))
    fields = {field: _first(recipe, keys) for field, keys in chosen.settings.items()}
    return cast(PolicyObjective, make(name=recipe.objective, **fields))


def _first(recipe: Recipe, keys: Sequence[str]) -> Any:
    """The first of these dotted keys that is not null."""
    found = (reduce(getattr, key.split("."), recipe) for key in keys)
    return next((value for value in found if value is not None), None)


def evaluation(
    recipe: Recipe,
    session: Session,
    tokenizer: Any,
    wrapped: torch.nn.Module,
    reference: Reference,
    judges: RewardSet,
    prompts: Sequence[Prompt],
    steps: int,
    engine: Engine | None = None,
) -> Evaluation:
    """Held-out prompts with the same noise each time, judged by the rewards and whoever else ``eval`` names."""
    at = recipe.eval.temperature or recipe.rollout.temperature
    return Evaluation(
        session=session,
        prompts=prompts,
        sampler=sampling.sampler(recipe, session.runtime, tokenizer, wrapped, 1, at, engine),
        rewards=judges,
        reference=reference,
        temperature=at,
        microbatch_tokens=recipe.batch.microbatch_tokens,
        every_steps=recipe.eval.every_steps or 0,
        steps=steps,
    )


def build(recipe: Recipe, session: Session) -> Job:
    """Data first, models after it: nothing is loaded for a run that cannot start."""
    runtime = session.runtime
    models.refuse_what_needs_whole_weights(recipe, runtime)
    rewards.refuse_other_bases(recipe, runtime)
    own = runtime.share(recipe.batch.prompts_per_step, "prompts")
    tokenizer = models.tokenizer_of(recipe)
    train_prompts, held_out = data.train_and_eval(data.prompts, recipe, session.note, tokenizer)
    mixed = _instruction_rows(recipe, tokenizer, session.note)
    steps = recipe.run.steps or math.ceil(len(train_prompts) / recipe.batch.prompts_per_step)
    # loaded after the rewards, unless one of them lies on its base
    causal_lm = cache(partial(models.causal_lm, recipe, tokenizer, runtime.device))
    scores = rewards.reward_set(recipe, runtime, session.note, steps=steps, policy=causal_lm)
    judges = rewards.with_judges(recipe, runtime, scores, session.note, steps=steps)
    goal = objective(recipe)
    _minibatches_have_prompts(goal, own)
    lm = causal_lm()
    critic = models.critic(recipe, tokenizer, lm, session.note) if "values" in goal.needs else None
    policy = models.scored(recipe, runtime, lm, critic)
    _say_where_the_judge_is_the_smaller(session, scores, policy)
    anchor: Reference | None = models.reference(recipe, policy, runtime)
    wrapped, optimizer = distributed.prepare(runtime, policy, models.adamw(recipe, policy))
    anchor = anchor or AdapterOffReference(wrapped, policy)
    _say_where_frozen_models_lie(recipe, session)
    if isinstance(anchor, MovingReference):
        session.kept["reference"] = anchor.moving()
    settings, layout = recipe.rollout, models.layout(recipe, policy, anchor)
    decoder = sampling.engine(recipe, runtime, tokenizer, session.root.parent)
    k, temperature = settings.samples_per_prompt, settings.temperature
    stream = streams.ShuffledPrompts(
        prompts=train_prompts,
        per_step=recipe.batch.prompts_per_step,
        seed=recipe.run.seed,
        rank=runtime.rank,
        ranks=runtime.world_size,
    )
    early = scores.ended if scores.remote else None  # servers score what has ended while the rest is decoded
    draw = sampling.sampler(recipe, runtime, tokenizer, wrapped, k, temperature, decoder, early)
    if settings.ahead:
        draw = AheadSampler(sampler=cast(EngineSampler, draw), prompts_of=stream.at, steps=steps)
    run = program.PolicyRun(
        session=session,
        model=wrapped,
        sampler=draw,
        rewards=scores,
        reference=anchor,
        objective=goal,
        beta=recipe.kl.beta,
        layout=layout,
        updater=models.updater(
            recipe,
            runtime,
            wrapped,
            optimizer,
            PolicyForward(anchor, layout),
            steps * passes_of(goal).updates,
            layout,
        ),
        prompts=stream,
        instruction=_instruction(recipe, runtime, anchor, layout, mixed),
        evaluation=evaluation(recipe, session, tokenizer, wrapped, anchor, judges, held_out, steps, decoder),
        steps=steps,
        seed=recipe.run.seed,
        samples_logged=recipe.tracking.samples,
    )
    return Job(train=partial(program.train, run), model=wrapped, optimizer=optimizer, tokenizer=tokenizer, steps=steps)


def _minibatches_have_prompts(goal: PolicyObjective, own: slice) -> None:
    """Every process deals its own prompts to the minibatches, and a group is never split."""
    wanted, prompts = passes_of(goal).minibatches, own.stop - own.start
    if wanted > prompts:
        raise UserError(
            f"ppo.minibatches={wanted}, and a process has {prompts} of the step's prompts: a minibatch would be empty; "
            f"set ppo.minibatches={prompts}, or raise batch.prompts_per_step"
        )


def _say_where_frozen_models_lie(recipe: Recipe, session: Session) -> None:
    """Those that are not whole on every process."""
    own = recipe.policy.lora is None or recipe.reference.path is not None  # else it is the policy without its adapter
    asked: list[tuple[str, str]] = [("reference", recipe.reference.placement)] if own else []
    asked += [
        (f"reward model {short_name(entry.path)}", entry.placement) for entry in recipe.reward.models if entry.path
    ]
    for name, how in asked:
        if how == "zero3" and session.runtime.world_size > 1:
            session.note(f"{name}: in shares over {session.runtime.world_size} processes (ZeRO-3)")
        if how == "offload" and session.runtime.device.type != "cpu":
            session.note(f"{name}: in host memory while it is idle")
        if how == "policy_base":
            session.note(f"{name}: an adapter and a head on the policy's base weights")


def _say_where_the_judge_is_the_smaller(session: Session, rewards: RewardSet, policy: torch.nn.Module) -> None:
    own = models.parameters(policy)
    for source, _ in rewards.models:
        if isinstance(source, RewardModel) and isinstance(source.model, TrunkClassifier):
            continue  # the same base
        if isinstance(source, RewardModel) and (size := models.parameters(source.model)) < own:
            session.note(
                f"remark: reward model {source.name} has {size:,} parameters and the policy {own:,}; a smaller reward "
                "model is easier to exploit, so watch a source of weight 0 and the KL"
            )


def _instruction_rows(recipe: Recipe, tokenizer: Any, note: Callable[[str], None]) -> list[Dialogue]:
    if recipe.instruction.coefficient == 0:
        return []
    rows, _ = data.demonstrations(recipe, recipe.data.instruction, tokenizer)
    return data.tokenised(recipe, rows, tokenizer, note)


def _instruction(
    recipe: Recipe, runtime: Runtime, reference: Reference, layout: Layout, rows: list[Dialogue]
) -> streams.InstructionTerms | None:
    """As many gold rows a step as there are prompts."""
    if not rows:
        return None
    size = recipe.batch.prompts_per_step
    batches = streams.ShuffledDemonstrations(
        rows=rows, per_step=size, seed=recipe.run.seed, own=runtime.share(size, "instruction rows")
    )
    return streams.InstructionTerms(
        batches=batches,
        objective=Demonstrations(name="instruction", per="completion"),
        coefficient=recipe.instruction.coefficient,
        reference=reference,
        microbatch_tokens=recipe.batch.microbatch_tokens,
        runtime=runtime,
        layout=layout,
    )
