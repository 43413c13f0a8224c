"""``rlhf recipes``: list, show and copy what ships. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from rlhf.errors import UserError
from rlhf.locate import command_name, recipe_file, shipped_folder, shipped_recipes
from rlhf.objectives.presets import OBJECTIVES, POLICY_SECTIONS, Preset

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A shipped name such as `quickstart/reinforce`.")]

_SCHEMA = "# yaml-language-server: $schema="


@app.callback(invoke_without_command=True)
def recipes(
    context: typer.Context,
    objectives: Annotated[
        bool, typer.Option("--objectives", help="List what `objective:` may say: formula, source, bias, pinned keys.")
    ] = False,
) -> None:
    """List the shipped recipes; `show` prints one, `copy` makes one yours."""
    if context.invoked_subcommand is not None:
        return
    if objectives:
        _list_objectives()
        return
    for name, file in shipped_recipes().items():
        typer.echo(f"{name:<24}{_headline(file)}")
        typer.echo(f"{'':<24}{command_name(file)}")


def _list_objectives() -> None:
    for name, entry in OBJECTIVES.items():
        pins = ", ".join(f"{key}={value}" for key, value in entry.pins.items())
        lines = {"needs": "; ".join(entry.needs), "source": entry.source, "bias": entry.bias, "pins": pins}
        typer.echo(f"{name}\n    {entry.formula}")
        for label, text in {**lines, "defaults": _defaults(entry)}.items():
            if text:
                typer.echo(f"    {label:<9}{text}")


def _defaults(entry: Preset) -> str:
    """The keys of the sections that are this objective's own, without those that its name pins."""
    from rlhf.recipe import Recipe

    own = [name for name in Recipe.model_fields if name in (entry.sections or ()) and name not in POLICY_SECTIONS]
    found = []
    for section in own:
        fields = Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        keys = {f"{section}.{name}": field.default for name, field in fields.items()}
        found += [f"{key}={json.dumps(value)}" for key, value in keys.items() if key not in entry.pins]
    return ", ".join(found).replace('"', "")


@app.command()
def show(name: RecipeName) -> None:
    """Print a shipped recipe."""
    typer.echo(recipe_file(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: RecipeName,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="[DEST]", help="A file or a folder; left out: the name, here.", show_default=False),
    ] = None,
) -> None:
    """Copy a shipped recipe, to be changed. Nothing is overwritten.

    `rlhf recipes copy quickstart/reinforce mine.yaml`
    """
    source = recipe_file(name)
    target = _target(source, destination)
    text = _with_schema(source.read_text(encoding="utf-8"), target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:  # x: a file that appears meanwhile is not overwritten either
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{target} exists and is not overwritten; name another file, or remove it") from error
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); name another place") from error
    typer.echo(f"copied to {target}")
    typer.echo(f"next: rlhf check {target}")
    typer.echo(
        f"then: rlhf train {target} run.name=mine    (a name of its own: the shipped recipe keeps its directory)"
    )


def _target(source: Path, destination: Path | None) -> Path:
    """``quickstart/reinforce`` → ``quickstart-reinforce.yaml``, here or in the folder that was named."""
    names = {file.resolve(): name for name, file in shipped_recipes().items()}
    file = names.get(source.resolve(), source.stem).replace("/", "-") + ".yaml"
    if destination is None:
        return Path(file)
    wanted = destination.expanduser()
    return wanted / file if wanted.is_dir() else wanted


def _with_schema(text: str, target: Path) -> str:
    """The text with its first line leading to the schema from the new place, or without it where none is installed."""
    first, _, rest = text.partition("\n")
    if not first.startswith(_SCHEMA):
        return text
    schema = shipped_folder("recipes").parent / "docs" / "recipe.schema.json"
    if not schema.is_file():
        return rest
    return f"{_SCHEMA}{os.path.relpath(schema, target.parent.resolve())}\n{rest}"


def _headline(file: Path) -> str:
    """The first comment line that is for people."""
    lines = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("yaml-language-server")), "")
