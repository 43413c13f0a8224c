"""What a name means: shipped recipes and accelerate configurations (in a clone, an editable install or a wheel), and
code named ``package.module:attribute``. No torch."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder ``recipes`` or ``accelerate_configs``: beside the package (clone, ``-e``), else in it (wheel).

    A folder beside the package counts only when setup.cfg lies there too: site-packages may hold a stranger's
    ``recipes``.
    """
    clone = _PACKAGE.parent
    if (clone / "setup.cfg").is_file() and (clone / name).is_dir():
        return clone / name
    return _PACKAGE / name


def shipped_recipes() -> dict[str, Path]:
    """Name (``quickstart/sft``) → file, sorted by name."""
    folder = shipped_folder("recipes")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def shipped_accelerate_configs() -> dict[str, Path]:
    """Name (``cpu_zero3``) → file, sorted by name."""
    return {file.stem: file for file in sorted(shipped_folder("accelerate_configs").glob("*.yaml"))}


def recipe_file(path_or_name: str) -> Path:
    """The file of a recipe given as a path or as a shipped name. Raises UserError that lists what there is."""
    return _find(path_or_name, shipped_recipes(), "recipe", "rlhf recipes lists them")


def accelerate_config_file(path_or_name: str) -> Path:
    """The file of an accelerate configuration given as a path or as a shipped name. Raises UserError."""
    return _find(path_or_name, shipped_accelerate_configs(), "accelerate configuration", "or a path of your own")


def command_name(file: Path) -> str:
    """How to name this recipe on the command line: a relative path where it is short, else the shipped name."""
    if file.resolve().is_relative_to(Path.cwd()):
        return str(file.resolve().relative_to(Path.cwd()))
    names = {path.resolve(): name for name, path in shipped_recipes().items()}
    return names.get(file.resolve(), str(file))


def _find(given: str, shipped: dict[str, Path], what: str, more: str) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    bare = given.removeprefix("recipes/").removeprefix("accelerate_configs/").removesuffix(".yaml")
    if bare in shipped:
        return shipped[bare]
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "no .yaml file"
        raise UserError(f"{given}: is a folder, not a {what}; it holds {inside}")
    near = difflib.get_close_matches(bare, shipped, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped) or 'none'} ({more})"
    raise UserError(f"{given}: no such {what} file, and none is shipped under that name; {hint}")


def named_code(call: str, what: str) -> Callable[..., Any]:
    """The function or class named ``package.module:attribute``; modules of the working directory are found too.

    ``what`` starts the messages: ``reward function``, ``data.*.path``. Raises UserError that says which part of the
    name is wrong.
    """
    module_name, colon, path = call.partition(":")
    if not (module_name and colon and path):
        raise UserError(f"{what} {call!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{what} {call}: module {module_name} cannot be imported ({error}); install it, or start the run in the "
            "folder that holds it"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=1)
            raise UserError(
                f"{what} {call}: {module_name} has no {part!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{what} {call} is {found!r:.60} ({type(found).__name__}), which cannot be called")
    return found  # type: ignore[no-any-return]
