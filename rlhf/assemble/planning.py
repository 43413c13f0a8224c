"""Recipe → what is planned: the models by shape, the sizes of a step, and how it is decoded."""

from __future__ import annotations

from rlhf.assemble import models
from rlhf.assemble.rewards import NO_SHARES
from rlhf.assemble.shapes import Shapes
from rlhf.errors import UserError
from rlhf.objectives.presets import is_dotted
from rlhf.planning.frozen import Where
from rlhf.planning.placement import Placement
from rlhf.planning.setup import Judge, Machine, Rollouts, Setup, Step, known
from rlhf.planning.shapes import Shape
from rlhf.recipe import Recipe
from rlhf.recipe.reading import program_of, reads
from rlhf.recipe.sections import RewardModel, RewardSource
from rlhf.runtime.step_size import VECTORS

_ROWS = {"sft": 1, "preference": 2, "reward": 2}  # a prompt's rows where they are given


def setup(recipe: Recipe, placement: Placement, machine: Machine, shapes: Shapes) -> Setup:
    """Everything that a plan needs. Raises UserError where a model's size is not known, and for what cannot lie in
    shares: quantized weights, and a base that a reward model shares."""
    if recipe.policy.quantize is not None and placement.sharded:
        raise UserError(models.NO_SHARDS)
    judges = _judges(recipe, shapes)
    for judge in judges:
        if judge.where == "policy_base" and placement.sharded:
            raise UserError(NO_SHARES.format(key=judge.key))
    program, policy = program_of(recipe), shapes.policy(recipe)
    compared = program in ("policy", "preference")
    dtype = recipe.policy.compute_dtype
    lora = recipe.policy.lora
    return Setup(
        program=program,
        policy=policy,
        step=step(recipe),
        placement=placement,
        machine=machine,
        rollouts=_rollouts(recipe, policy),
        reference=_reference(recipe, policy, shapes) if compared else None,
        reference_where=models.placement(recipe.reference.placement),
        compares=compared and recipe.objective != "simpo",
        critic=_critic(recipe, policy, shapes),
        judges=judges,
        rank=lora.r if lora is not None else 0,
        low=dtype == "bfloat16" or (dtype == "auto" and not machine.cpu),
        exact=compared and recipe.kl.estimator == "exact",
        vectors=1 + VECTORS if recipe.objective == "trpo" else 1 if recipe.optim.kl_step_limit else 0,
        bits=recipe.policy.quantize,
        reference_bits=recipe.reference.quantize if compared else None,
    )


def step(recipe: Recipe) -> Step:
    """Sizes, every row at its longest. Given texts are taken to be as long as completions may be."""
    program = program_of(recipe)
    ppo = reads(recipe, "ppo") and not is_dotted(recipe.objective)
    parts = recipe.ppo.minibatches if ppo else 1
    return Step(
        prompts=recipe.batch.prompts_per_step,
        rows=_ROWS.get(program, recipe.rollout.samples_per_prompt),
        prompt=recipe.data.prompt_tokens or recipe.data.max_prompt_tokens,
        completion=recipe.rollout.max_new_tokens,
        microbatch=recipe.batch.microbatch_tokens,
        share_prompts=recipe.batch.share_prompts,
        activations=recipe.batch.activations,
        parts=parts,
        updates=parts * recipe.ppo.epochs if ppo else recipe.reinforce.updates_per_rollout,
    )


def _rollouts(recipe: Recipe, policy: Shape) -> Rollouts:
    given = recipe.rollout
    plain = given.decode == "generate" or given.stop or not known(policy)
    return Rollouts(
        engine=("vllm" if given.url is None else "server")
        if given.engine == "vllm"
        else "generate"
        if plain
        else "loop",
        kv_bytes=given.kv_cache_gib * 2**30,
        gpu_fraction=given.gpu_fraction,
        by_layer=given.gather == "layers",
    )


def _reference(recipe: Recipe, policy: Shape, shapes: Shapes) -> Shape | None:
    """Another checkpoint, a copy of the policy, or the policy with its adapter off."""
    if recipe.reference.path is not None:
        return shapes.at(recipe.reference.path, "reference.path", recipe.policy.attention)
    return None if recipe.policy.lora is not None else policy


def _critic(recipe: Recipe, policy: Shape, shapes: Shapes) -> Shape | None:
    """The reward model's trunk where it has the policy's vocabulary, else the policy's. A shared one is one row."""
    if not reads(recipe, "value") or is_dotted(recipe.objective) or recipe.value.shared:
        return None
    judge = recipe.reward.models[0].path if recipe.reward.models and recipe.value.init == "reward" else None
    if judge is not None:
        found = shapes.at(judge, "reward.models.0.path", recipe.policy.attention)
        if found.vocab == policy.vocab:
            return found.as_scalar()
    return policy.as_scalar()


def _judges(recipe: Recipe, shapes: Shapes) -> tuple[Judge, ...]:
    """Reward models that are held here: those of the reward, and those that judge held-out completions."""
    if not reads(recipe, "reward"):
        return ()
    named: list[tuple[RewardSource, str, Where]] = [
        (entry, f"reward.models.{at}", _where(entry)) for at, entry in enumerate(recipe.reward.models)
    ]
    named += [(entry, f"eval.models.{at}", "replicate") for at, entry in enumerate(recipe.eval.models)]
    return tuple(_judge(recipe, shapes, *each) for each in named if each[0].path is not None)


def _where(entry: RewardModel) -> Where:
    return "policy_base" if entry.placement == "policy_base" else models.placement(entry.placement)


def _judge(recipe: Recipe, shapes: Shapes, entry: RewardSource, key: str, where: Where) -> Judge:
    path, rank = entry.path or "", 0
    if where == "policy_base":
        shape, rank = shapes.adapter(path, f"{key}.path")
    else:
        shape = shapes.at(path, f"{key}.path")
    tokens = entry.microbatch_tokens or recipe.batch.microbatch_tokens
    return Judge(shape=shape.as_scalar(), tokens=tokens, where=where, key=key, bits=entry.quantize, rank=rank)
