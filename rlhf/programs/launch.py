"""One run from recipe to ``final/``: process group, run directory, data, models, loop, export."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf import assemble
from rlhf.assemble.rewards import served_identities
from rlhf.errors import ExitCode, UserError
from rlhf.interfaces import TrainState
from rlhf.models import adapters, load
from rlhf.models.chat import stop_ids
from rlhf.programs import fits
from rlhf.programs.keeper import Keeper, write_record
from rlhf.programs.session import Session
from rlhf.recipe import Recipe, local_inputs
from rlhf.runtime import distributed
from rlhf.runtime.distributed import Runtime
from rlhf.runtime.fingerprint import fingerprint
from rlhf.runtime.run_dir import ELSEWHERE, RunDirectory, Status, open_run
from rlhf.tracking.tracker import build_tracker

_OF_ONE_RANK = (ExitCode.USER, ExitCode.REWARD_GONE)  # may end a single process; the others are told of the rest
# Keys that may differ when a run is resumed: they change what is seen of a run or when it pauses, nothing it computes.
_FREE = (
    *("run.resume", "run.max_seconds", "run.memory_check", "tracking.", "rollout.push_folder", "rollout.gather"),
    *("checkpoint.keep", "checkpoint.every_steps", "batch.activations"),
)
_FREE_ENDS = (".url", ".token_env", ".give_up_seconds")  # where a server lies; what a reward server holds is pinned


def train(recipe: Recipe, command: list[str]) -> ExitCode:
    """Runs or resumes the recipe and says how it ended; the same is written to run.json.

    Raises UserError for input that cannot work before the run directory is open.
    """
    load.quiet_libraries()
    runtime = distributed.start(
        max_grad_norm=recipe.optim.max_grad_norm,
        compute_dtype=distributed.auto_dtype(recipe.policy.compute_dtype),
    )
    try:
        fits.refuse_what_cannot_fit(recipe, runtime, lambda text: _say(runtime, text))
        with _open(recipe, runtime, command) as directory:
            for note in directory.notes:
                _say(runtime, note)
            return ExitCode.DONE if directory.finished else _guarded(recipe, runtime, directory)
    finally:
        distributed.leave(runtime)


def _open(recipe: Recipe, runtime: Runtime, command: list[str]) -> RunDirectory:
    """Rank 0 opens the directory; the others are told the answer, a refusal included."""

    def changed(old: str) -> list[str]:
        keys = recipe.differences(Recipe.model_validate(yaml.safe_load(old)))
        return [key for key in keys if not key.startswith(_FREE) and not key.endswith(_FREE_ENDS)]

    answer: RunDirectory | UserError | None = None
    if runtime.main:
        try:
            answer = open_run(
                recipe.output_dir, recipe.to_yaml(), changed, recipe.run.resume, command=shlex.join(command)
            )
        except UserError as error:
            answer = error
    told = replace(answer, lock=None) if isinstance(answer, RunDirectory) else answer
    shared = runtime.gather_objects(told)[0]
    if isinstance(shared, UserError):
        raise shared
    return answer if isinstance(answer, RunDirectory) else shared


def _guarded(recipe: Recipe, runtime: Runtime, directory: RunDirectory) -> ExitCode:
    """Runs, and writes down how it ended whatever happens."""
    try:
        _pin(recipe, runtime, directory)
        step = _run(recipe, runtime, directory)
    except UserError as error:
        status: Status = "preempted" if error.code == ExitCode.PREEMPTED else "failed"
        _finish(runtime, directory, status, error.code, str(error))
        if runtime.main or error.code in _OF_ONE_RANK:
            print(str(error) if runtime.main else f"rank {runtime.rank}: {error}", file=sys.stderr, flush=True)
        return error.code
    except BaseException as error:
        first = directory.failed_elsewhere() if runtime.main else None
        if first is not None:
            _say(runtime, f"another process ended, and this one with it: {first.reason}", stream=sys.stderr)
            return first.code
        code = ExitCode.OUT_OF_MEMORY if _out_of_memory(error) else ExitCode.BUG
        _finish(runtime, directory, "failed", code, f"{type(error).__name__}: {error}")
        if code == ExitCode.BUG:
            raise
        traceback.print_exc()
        return code
    _finish(runtime, directory, "finished", ExitCode.DONE, "done", step)
    if runtime.main and assemble.program_of(recipe) in ("policy", "preference"):
        from rlhf.programs.report import write_report

        _say(runtime, f"report: {write_report(directory.path)}")
    return ExitCode.DONE


def _pin(recipe: Recipe, runtime: Runtime, directory: RunDirectory) -> None:
    """Refuses to go on with inputs whose content changed under their names; every rank hears the answer."""
    refusal: UserError | None = None
    if runtime.main:
        try:
            files = {key: fingerprint(path) for key, path in local_inputs(recipe).items()}
            directory.pin(files | served_identities(recipe, partial(_say, runtime)))
        except UserError as error:
            refusal = error
    refusal = runtime.gather_objects(refusal)[0]
    if refusal is not None:
        raise refusal


def _run(recipe: Recipe, runtime: Runtime, directory: RunDirectory) -> int:
    """Trains what is left and exports; returns the last step."""
    torch.manual_seed(recipe.run.seed)
    tracker = build_tracker(
        directory.path,
        to=recipe.tracking.to,
        project=recipe.tracking.project,
        run_name=directory.path.name,
        config=recipe.model_dump(mode="json"),
        main=runtime.main,
        total_steps=recipe.run.steps,
    )
    status = "failed"
    try:
        tracker.note(runtime.describe())
        session = Session(
            runtime=runtime,
            tracker=tracker,
            root=directory.checkpoints,
            every_steps=recipe.checkpoint.every_steps or 0,
            keep=recipe.checkpoint.keep,
            max_seconds=recipe.run.max_seconds,
        )
        with session.listening():
            job = assemble.build(recipe, session)
            session.keeper = _keeper(recipe, runtime, job, directory)
            tracker.set_total(job.steps)
            state = TrainState()
            if directory.resume_from is not None:
                state = session.resume(directory.resume_from, job.model, job.optimizer)
                tracker.note(f"resumed from {directory.resume_from.name}")
            state = job.train(state)
        job.finish(job.model)
        _export(recipe, runtime, job, directory, "final")
        status = "finished"
        return state.step
    finally:
        tracker.close(status)


def _keeper(recipe: Recipe, runtime: Runtime, job: assemble.Job, directory: RunDirectory) -> Keeper | None:
    """What writes ``best/`` where the recipe asks for it."""
    if recipe.eval.keep_best is None:
        return None

    def keep(record: Mapping[str, float | int | str]) -> None:
        job.finish(job.model)
        _export(recipe, runtime, job, directory, "best", partial(write_record, record=record))

    return Keeper(recipe.eval.keep_best, directory.path / "best", keep)


def _export(
    recipe: Recipe,
    runtime: Runtime,
    job: assemble.Job,
    directory: RunDirectory,
    name: str,
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """A transformers folder with weights, tokenizer, generation config and model card; of a LoRA reward model also with
    its adapter, for runs that have the base already."""
    inner: Any = distributed.unwrap(job.model)
    model: Any = getattr(inner, "causal_lm", None) or inner.classifier
    merge = hasattr(inner, "classifier")  # a reward model is loaded by other runs, which know nothing of its adapter

    def beside(staging: Path) -> None:
        if merge and hasattr(model, "peft_config"):
            adapters.keep(model, staging, (directory.read().get("hashes") or {}).get("policy.path"))
        extra(staging)

    with runtime.gathered(job.model):
        if runtime.main:
            stops = stop_ids(job.tokenizer, getattr(model, "generation_config", None))
            card, folder = _card(recipe, directory.path), directory.path / name
            load.export(model, job.tokenizer, folder, stop_ids=stops, card=card, merge=merge, extra=beside)
    runtime.barrier()


def _card(recipe: Recipe, path: Path) -> str:
    source = recipe.policy.path or "random weights"
    return (
        f"---\nlibrary_name: transformers\ntags: [rlhf, {recipe.objective}]\n---\n\n# {path.name}\n\n"
        f"Objective `{recipe.objective}`, started from {source}. The recipe that made it:\n\n"
        f"```yaml\n{recipe.to_yaml()}```\n"
    )


def _finish(
    runtime: Runtime, directory: RunDirectory, status: Status, code: ExitCode, reason: str, step: int | None = None
) -> None:
    """Written by the main process; by another where it fails alone, since the main one will only find it gone."""
    told, first = reason.split("\n")[0][:500], directory.read().get("status") != "failed"
    if runtime.main and (first or code not in (ExitCode.BUG, ExitCode.PREEMPTED)):  # else it only follows another
        directory.finish(status, code, told, step=step)
    if not runtime.main and status == "failed" and first:
        directory.finish(status, code, f"{ELSEWHERE}{runtime.rank}: {told}")


def _out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own; on CPU it is a RuntimeError of the allocator."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _say(runtime: Runtime, text: str, stream: Any = None) -> None:
    if runtime.main:
        print(text, file=stream or sys.stdout, flush=True)
