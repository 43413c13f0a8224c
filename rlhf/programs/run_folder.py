"""A run by its directory: its recipe, and where its newest weights lie. Torch-free, so that a wrong name is answered at
once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from rlhf.errors import UserError
from rlhf.objectives.presets import preset
from rlhf.recipe import Recipe
from rlhf.runtime.step_directories import checkpoint_steps


@dataclass(frozen=True)
class RunFolder:
    """path: the directory. recipe: the resolved one that made it. final: its finished model; None = only checkpoints
    exist."""

    path: Path
    recipe: Recipe
    final: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample. None = as the run did. prompts and file: neither = the run's held-out prompts, the first
    ``rows``. count: completions of each. temperature 0 = the most likely token each time. side_by_side None = where the
    run started from another model."""

    prompts: tuple[str, ...] = ()
    file: Path | None = None
    rows: int = 4
    count: int = 1
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    side_by_side: bool | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def changed(self, recipe: Recipe) -> Recipe:
        """The recipe with what was asked for in place of its own values."""
        given = {"temperature": self.temperature or None, "max_new_tokens": self.max_new_tokens}
        rollout = recipe.rollout.model_copy(update={key: value for key, value in given.items() if value is not None})
        run = recipe.run if self.seed is None else recipe.run.model_copy(update={"seed": self.seed})
        return recipe.model_copy(update={"rollout": rollout, "run": run})

    def check(self, folder: RunFolder) -> None:
        """Raises UserError for what cannot be sampled."""
        if preset(folder.recipe.objective).program == "reward":
            raise UserError(
                f"{folder.path} is a reward model: it scores completions and writes none; name a policy's run"
            )
        if self.prompts and self.file is not None:
            raise UserError("--prompt and --file both name prompts; give one of them")
        if self.file is not None and not self.file.is_file():
            raise UserError(f'--file {self.file} does not exist; it is a file of rows like {{"prompt": "Hi"}}')
        if self.greedy and self.count > 1:
            raise UserError(
                f"--count {self.count} with --temperature 0: every completion would be the same; set --count 1"
            )


def open_folder(path: Path) -> RunFolder:
    """Raises UserError, one line, where there is no run or no weights in it."""
    recipe = _recipe(path)
    final = path / "final"
    if any((final / name).is_file() for name in ("config.json", "adapter_config.json")):
        return RunFolder(path, recipe, final)
    if not checkpoint_steps(path / "checkpoints"):
        raise UserError(f"{path} has no final/ and no checkpoint yet; the same `rlhf train` command goes on with it")
    return RunFolder(path, recipe, None)


def _recipe(path: Path) -> Recipe:
    try:
        text = (path / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_no_run(path)) from error
    try:
        return Recipe.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        first = str(error).splitlines()[1] if isinstance(error, ValidationError) else "it is no YAML"
        file = path / "recipe.yaml"
        raise UserError(
            f"{file} cannot be read by this version ({first.strip()}); use the version that made the run"
        ) from error


def _no_run(path: Path) -> str:
    if (path.parent / "recipe.yaml").is_file():
        return f"{path} is a part of a run; name the run: {path.parent}"
    if not path.exists():
        near = sorted(found.parent for found in Path("runs").glob("*/recipe.yaml")) if Path("runs").is_dir() else []
        there = f"; runs here: {', '.join(map(str, near[:5]))}" if near else "; `rlhf train` makes one"
        return f"{path} does not exist{there}"
    return f"{path} holds no run (no recipe.yaml); name a directory like runs/NAME"
