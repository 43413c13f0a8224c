"""Recipe → the shapes of its models, from configurations alone: a folder's, a recipe's that makes the folder, a public
model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.assemble import models
from rlhf.errors import UserError
from rlhf.locate import command_name
from rlhf.planning.families import known_config
from rlhf.planning.shapes import Shape, read_shape
from rlhf.recipe import Recipe, load_recipe
from rlhf.recipe.paths import ADAPTER, made_by, place

_DEPTH = 8  # recipes that start from one another


@dataclass(frozen=True)
class Shapes:
    """Looks shapes up. folder: where the recipe lies; its neighbours may make what it needs. online: the hub may be
    asked for a configuration that is not in the cache."""

    folder: Path | None = None
    online: Callable[[], bool] = lambda: False
    found: dict[tuple[object, ...], Shape] = field(default_factory=dict)

    def policy(self, recipe: Recipe, depth: int = 0) -> Shape:
        """The trained model; a reward model as such. Raises UserError where nothing is known of it."""
        settings = recipe.policy
        targets = settings.lora.targets if settings.lora is not None else "all-linear"
        if settings.path is not None:
            found = self.at(settings.path, "policy.path", settings.attention, targets, depth)
        else:
            found = self._scratch(recipe, depth)
        return found.as_scalar() if recipe.objective == "reward" else found

    def at(
        self,
        path: str,
        key: str,
        attention: str = "auto",
        targets: str | tuple[str, ...] = "all-linear",
        depth: int = 0,
    ) -> Shape:
        """The model at a path or hub id. key: of the recipe, for messages."""
        here = Path(path).expanduser()
        if place(path) == "local" and not here.exists():
            return self._made(path, key, depth)
        wanted = (path, attention, targets)
        if wanted not in self.found:  # building a model on the meta device takes a second
            config, source = self._config(path, key)
            self.found[wanted] = read_shape(config, name=path, source=source, attention=attention, targets=targets)
        return self.found[wanted]

    def adapter(self, path: str, key: str) -> tuple[Shape, int]:
        """A reward model that was trained with LoRA, or that a recipe will train so, and its adapter's rank."""
        file = Path(path).expanduser() / ADAPTER / "adapter_config.json"
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            names = settings["target_modules"]  # whole names, or their ends; peft's own choice
            targets = names if isinstance(names, str) else tuple(sorted({name.rpartition(".")[2] for name in names}))
            return self.at(path, key, targets=targets), int(settings["r"])
        maker = made_by(Path(path).expanduser(), self.folder)
        lora = load_recipe(str(maker), inputs=False).policy.lora if maker is not None else None
        if lora is None:
            raise UserError(
                f"{key}={path}: no adapter there, and no recipe is known whose run makes one; set placement=auto"
            )
        return self.at(path, key), lora.r

    def _made(self, path: str, key: str, depth: int) -> Shape:
        """What the recipe trains whose run will leave this folder."""
        maker = made_by(Path(path).expanduser(), self.folder)
        if maker is None or depth >= _DEPTH:
            raise UserError(
                f"{key}={path}: does not exist, and no recipe is known whose run makes it, so its size is not known; "
                "give a folder that holds a config.json, or the id of a public model"
            )
        recipe = load_recipe(str(maker), inputs=False)
        found = replace(self, folder=maker.parent).policy(recipe, depth + 1)
        # a reward model is written in the float32 that it was trained in
        stored = 4 if recipe.objective == "reward" else found.stored_bytes
        return replace(found, name=path, source=f"what {command_name(maker)} makes", stored_bytes=stored)

    def _config(self, path: str, key: str) -> tuple[Any, str]:
        from transformers import AutoConfig

        base = _base(path)
        try:
            local = Path(base).expanduser().exists()
            return AutoConfig.from_pretrained(base, local_files_only=not local), "config.json" if local else "hub cache"
        except (OSError, ValueError) as error:
            if place(base) == "local":
                raise UserError(f"{key}={path}: its config.json names no known model ({_first_line(error)})") from error
        table = known_config(base)
        if table is not None:
            return table, "table of public models; its own config.json was not at hand"
        try:
            if self.online():
                return AutoConfig.from_pretrained(base), "hub"
        except (OSError, ValueError) as error:
            raise UserError(f"{key}={path}: the hub has no configuration of it ({_first_line(error)})") from error
        raise UserError(
            f"{key}={path}: its configuration is not on this machine, the hub does not answer, and it is not in the "
            "table of public models; give a folder that holds its config.json (weights are not read)"
        )

    def _scratch(self, recipe: Recipe, depth: int) -> Shape:
        spec, tokenizer = recipe.policy.scratch, recipe.policy.tokenizer
        assert spec is not None
        vocab = spec.vocab_size
        if tokenizer is not None:
            vocab = self.at(tokenizer, "policy.tokenizer", depth=depth + 1).vocab
        config, name = models.scratch_config(recipe, vocab), f"{spec.family} from scratch"
        return read_shape(config, name=name, source="recipe", attention=recipe.policy.attention)


def _base(path: str) -> str:
    """The base of an adapter's folder, or the path itself."""
    from rlhf.models.load import base_of_adapter

    return base_of_adapter(path) or path


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
