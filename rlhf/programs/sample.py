"""``rlhf sample``: completions of a run, beside those of the model it started from, with the same noise and scores.

Prompts are rendered, decoded and stopped as in training. With the run's own prompts, seed, temperature and length, the
completions are those of its last evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf.assemble import data as assembled
from rlhf.assemble import models, rewards, sampling
from rlhf.data import formats
from rlhf.data.dropped import Dropped
from rlhf.errors import UserError
from rlhf.interfaces import Reward
from rlhf.models import load
from rlhf.models.load import quiet_libraries
from rlhf.models.policy import ScoredModel
from rlhf.programs.evaluation import NOISE_STEP, shown
from rlhf.programs.hub import offline_reason
from rlhf.programs.run_folder import Request, RunFolder
from rlhf.recipe import Recipe
from rlhf.recipe.reading import reads
from rlhf.recipe.schema import DataSource
from rlhf.rollout import Prompt, Rollout
from rlhf.runtime.checkpoint import load_checkpoint, newest_checkpoint
from rlhf.runtime.distributed import Runtime

_PEEK_ROWS = 64  # enough to see whether a run's prompts are conversations
Note = Callable[[str], None]


@dataclass(frozen=True)
class Completion:
    """One completion. scores: by source, None where the source could not score it."""

    text: str
    tokens: int
    finished: bool
    scores: dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """A prompt with the run's completion, and with that of the model it started from where both were asked for."""

    prompt: str
    number: int
    run: Completion
    start: Completion | None


@dataclass
class Scorer:
    """The run's reward sources, as far as they load. One that fails is noted once and left out from then on."""

    note: Note
    sources: list[Reward] = field(default_factory=list)

    def add(self, name: str, make: Callable[[], Reward]) -> None:
        try:
            self.sources.append(make())
        except UserError as error:
            self.note(f"no scores of {name}: {error}")

    def score(self, rollout: Rollout) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {}
        for source in list(self.sources):
            try:
                scores = source.score(rollout, NOISE_STEP).tolist()
            except Exception as error:  # a function may want a column that a typed prompt does not have
                self.sources.remove(source)
                self.note(f"no scores of {source.name}: {' '.join(str(error).split()) or type(error).__name__}")
                continue
            found[source.name] = [value if math.isfinite(value) else None for value in scores]
        return found


def samples(folder: RunFolder, request: Request, note: Note) -> list[Sample]:
    """Draws what was asked for. Raises UserError where there is no prompt or no model."""
    recipe = request.changed(folder.recipe)
    offline = offline_reason(_paths(recipe))
    if offline is not None:
        note(f"{offline}; only what is in the cache can be loaded")
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = Runtime(accelerator=None, kind="single", device=device)
    tokenizer = load.load_tokenizer(str(folder.final)) if folder.final else models.tokenizer_of(recipe)
    prompts = _prompts(recipe, request, tokenizer, note)
    own = _run_model(folder, tokenizer, device, note)
    other = _start_model(recipe, request, device, note)
    scorer = _scorer(recipe, runtime, note)
    sampler = sampling.sampler(recipe, runtime, tokenizer, own, request.count, recipe.rollout.temperature)
    draw = sampler.greedy if request.greedy else sampler.sample
    slots = range(len(prompts))
    rollout = draw(own.causal_lm.to(device), prompts, slots, NOISE_STEP)
    completions = _completions(rollout, scorer)
    start: list[Completion | None] = [None] * len(completions)
    if other is not None:
        start = [*_completions(draw(other.to(device), prompts, slots, NOISE_STEP), scorer)]
    return [
        Sample(shown(rollout.prompts[row]), int(rollout.sample[row]), completions[row], start[row])
        for row in range(len(completions))
    ]


def _paths(recipe: Recipe) -> list[str]:
    entries = [*recipe.data.eval, *recipe.data.train[:1]]
    given = [recipe.policy.path, *(entry.path for entry in recipe.reward.models), *(entry.path for entry in entries)]
    return [path for path in given if path is not None]


# ---- prompts


def _prompts(recipe: Recipe, request: Request, tokenizer: Any, note: Note) -> list[Prompt]:
    """Those that were given, in the form of the run's own; else the run's held-out ones."""
    if not request.prompts and request.file is None:
        return _held_out(recipe, tokenizer, note)[: request.rows]
    form = "chat" if _conversational(recipe, tokenizer, note) else "auto"
    if request.file is not None:
        source = DataSource(path=str(request.file), format=form)
        found, report = assembled.prompts(recipe, [source], tokenizer)
        if report.sources[0].dropped.total:
            assembled.tell(note, "--file", report)
        return found
    typed = [{"prompt": text} for text in request.prompts]
    dropped = Dropped()
    found = formats.to_prompts(typed, format=form, dropped=dropped)
    if dropped.total:
        raise UserError(f"--prompt: {dropped.lines()[0]}; give some text")
    return found


def _held_out(recipe: Recipe, tokenizer: Any, note: Note) -> list[Prompt]:
    entries: Sequence[DataSource] = recipe.data.eval
    if not entries:
        note("the run has no held-out rows (data.eval): prompts are of data.train")
        entries = recipe.data.train[:1]
    try:
        return assembled.prompts(recipe, entries, tokenizer)[0]
    except UserError as error:
        raise UserError(f"the run's own prompts cannot be had: {error}; give --prompt or --file") from error


def _conversational(recipe: Recipe, tokenizer: Any, note: Note) -> bool:
    """Whether the run was trained on conversations: then a typed prompt is a user turn."""
    first = recipe.data.train[0]
    rows = min(first.max_rows or _PEEK_ROWS, _PEEK_ROWS)
    try:
        seen = assembled.prompts(recipe, [first.model_copy(update={"max_rows": rows})], tokenizer)[0]
    except UserError as error:
        chat = bool(getattr(tokenizer, "chat_template", None))
        note(f"the run's rows cannot be read ({error}); prompts are {'user turns' if chat else 'plain text'}")
        return chat
    return seen[0].conversational


# ---- models


def _run_model(folder: RunFolder, tokenizer: Any, device: torch.device, note: Note) -> ScoredModel:
    """The run's newest weights: ``final/``, or the newest complete checkpoint of a run that has not finished."""
    recipe = folder.recipe
    dtype = models.compute_dtype(recipe)
    if folder.final is None:
        started = models.causal_lm(recipe, tokenizer, device)
        return _from_checkpoint(folder, ScoredModel(started, compute_dtype=dtype), note)
    if (folder.final / "config.json").is_file():
        return ScoredModel(load.load_causal_lm(str(folder.final), what="RUN"), compute_dtype=dtype)
    from peft import PeftModel

    base: Any = models.loaded_policy(recipe, device)  # adapters need a base: a rule of recipes
    return ScoredModel(PeftModel.from_pretrained(base, str(folder.final)), compute_dtype=dtype)


def _from_checkpoint(folder: RunFolder, model: ScoredModel, note: Note) -> ScoredModel:
    newest = newest_checkpoint(folder.checkpoints)
    for line in newest.notes:
        note(line)
    if newest.path is None:
        raise UserError(f"{folder.path} has no final/ and no complete checkpoint; go on training it first")
    note(f"{folder.path} is not finished: samples are of {newest.path.name}")
    weights = load_checkpoint(newest.path).files["model"]
    missing = {name for name, p in model.named_parameters() if p.requires_grad} ^ set(weights)
    if missing:
        raise UserError(f"{newest.path}: its weights are not of this recipe's model ({sorted(missing)[0]})")
    model.load_state_dict(dict(weights), strict=False)
    return model


def _start_model(recipe: Recipe, request: Request, device: torch.device, note: Note) -> nn.Module | None:
    """The model that the run started from; None where it is not wanted or there is none."""
    path = recipe.policy.path
    if request.side_by_side is False:
        return None
    if path is None:
        if request.side_by_side:
            note("the run started from random weights (policy.scratch): there is nothing to compare with")
        return None
    try:
        return models.loaded_policy(recipe, device)
    except UserError as error:
        note(f"no comparison: {error}")
        return None


# ---- scores


def _scorer(recipe: Recipe, runtime: Runtime, note: Note) -> Scorer:
    scorer = Scorer(note)
    if not reads(recipe, "reward"):
        return scorer
    for index, model in enumerate(recipe.reward.models):
        load = partial(rewards.reward_model, recipe, runtime, f"reward.models.{index}", model, note)
        scorer.add(str(model.path or model.url), load)
    for function in recipe.reward.functions:
        scorer.add(
            function.call, partial(rewards.reward_function, function.call, function.weight, steps=recipe.run.steps or 0)
        )
    return scorer


def _completions(rollout: Rollout, scorer: Scorer) -> list[Completion]:
    scores = scorer.score(rollout)
    return [
        Completion(
            text=rollout.texts[row],
            tokens=int(rollout.completion_mask[row].sum()),
            finished=bool(rollout.finished[row]),
            scores={name: values[row] for name, values in scores.items()},
        )
        for row in range(len(rollout))
    ]
