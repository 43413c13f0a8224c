"""``rlhf evaluate``: what a finished model is worth on held-out rows. Reward models so far.

Everything that can be wrong with the target, the rows and the columns is said before the model loads.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import ExitCode, UserError
from rlhf.recipe import Recipe, override
from rlhf.recipe.paths import place
from rlhf.runtime.manifest import write_json_atomic

FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is evaluated. model: folder or hub id. run: its run directory, where it has one. recipe: that run's."""

    model: str
    run: Path | None = None
    recipe: Recipe | None = None

    @property
    def results(self) -> Path:
        """Where the figures go: into the run directory, beside the weights of a bare folder, or here for a hub id."""
        return (self.run or (Path(self.model) if Path(self.model).is_dir() else Path())) / FILE


def main(
    given: str,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[str] = (),
    by: Sequence[str] = (),
    output: Path | None = None,
) -> ExitCode:
    """Evaluates a run directory or a model; prints a table and writes the figures. Raises UserError for bad input."""
    target = find_target(given)
    recipe = settings(target, data, overrides)
    from rlhf.models.load import quiet_libraries
    from rlhf.programs import evaluate_reward

    quiet_libraries()
    found = evaluate_reward.evaluate(recipe, by)
    written = output or target.results
    head = {"model": target.model, "kind": "reward", "at": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        write_json_atomic(written, {**head, **found})
    except OSError as error:
        raise UserError(f"{written} cannot be written ({error.strerror}); set --output to a place of yours") from error
    print(f"figures: {written}", flush=True)
    return ExitCode.DONE


def find_target(given: str) -> Target:
    """A run directory, its ``final/``, a model folder or a hub id, told apart by what is there.

    Raises UserError for what does not exist, has not finished, or is no reward model.
    """
    path = Path(given).expanduser()
    if not path.exists():
        if place(given) != "hub":
            raise UserError(f"{given} does not exist{_near(path)}; give a run directory, a model folder or a hub id")
        return Target(model=given)
    run = path if (path / "recipe.yaml").is_file() else path.parent
    model = run / "final" if run == path else path
    if (run / "recipe.yaml").is_file() and model == run / "final":
        return Target(model=str(model), run=run, recipe=_recipe_of(run, model))
    if not (path / "config.json").is_file():
        raise UserError(f"{given} holds neither recipe.yaml nor config.json, so it is neither a run nor a model folder")
    return Target(model=str(path))


def _recipe_of(run: Path, model: Path) -> Recipe:
    try:
        recipe = Recipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run / 'recipe.yaml'} cannot be read ({type(error).__name__}); give {model}") from error
    if recipe.objective != "reward":
        raise UserError(
            f"{run} is a run of objective {recipe.objective}, and this version evaluates reward models only; "
            "a policy's held-out figures are in its metrics.jsonl (eval/…) and report.html"
        )
    if not (model / "config.json").is_file():
        raise UserError(f"{run} has no final/ yet; let it finish: `rlhf train` with the same recipe goes on with it")
    return recipe


def settings(target: Target, data: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The recipe of the evaluation: the run's way of reading rows where there is a run, other rows where ``data`` names
    some, then ``overrides``. It is checked by the same rules as any recipe. Raises UserError."""
    run = target.recipe
    read = run.model_dump(mode="json") if run is not None else {}
    rows = [{"path": path} for path in data] or read.get("data", {}).get("eval", [])
    if not rows and not any(change.startswith("data.eval") for change in overrides):
        raise UserError("no rows to evaluate on; name some with --data FILE (chosen + rejected, or text + label)")
    values: dict[str, Any] = {
        "objective": "reward",
        "run": {"name": "evaluation", "seed": read.get("run", {}).get("seed", 42)},
        "policy": {"path": target.model, "compute_dtype": read.get("policy", {}).get("compute_dtype", "auto")},
        # a recipe has training rows; nobody reads these
        "data": {"train": [{"path": "rlhf.data.quickstart:preferences"}], "eval": rows},
        "batch": {"microbatch_tokens": read.get("batch", {}).get("microbatch_tokens", 16384)},
    }
    if run is not None:
        values["data"]["system_role"] = run.data.system_role
    return override(Recipe.model_validate_json(json.dumps(values)), overrides)


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
