"""A file and overrides → a recipe, or every error at once as one block of ``file:line: key: what`` lines."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.locate import command_name, recipe_file
from rlhf.objectives.presets import OBJECTIVES
from rlhf.recipe import rules, rules_algorithm, rules_models
from rlhf.recipe.marks import Document, KeyPath, Problem, plain, read_file, read_text
from rlhf.recipe.paths import path_rules, secrets
from rlhf.recipe.schema import Recipe
from rlhf.recipe.validate import Rule, check, schema_errors, unknown_key
from rlhf.recipe.wording import shown

RULES = (*rules.RULES, *rules_models.RULES, *rules_algorithm.RULES)


def load_recipe(path_or_name: str, overrides: Sequence[str] = (), *, inputs: bool = True) -> Recipe:
    """Reads a recipe by path or shipped name and applies ``key=value`` overrides, spelled like the YAML.

    inputs: False = what it points at (rows, models, code) need not be there, for who only asks how large it is.
    Raises UserError with one line per problem.
    """
    file = recipe_file(path_or_name)
    shown_as = path_or_name if Path(path_or_name).expanduser().is_file() else command_name(file)
    return _build(read_file(file), overrides, shown_as, path_rules(file.parent) if inputs else [])


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe made in Python, checked by the same rules, with overrides applied. Raises UserError."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    return _build(Document(values, {}), overrides, "recipe", path_rules(None))


@dataclass
class _Overrides:
    """Overrides applied to values in place; remembers which keys they set, and the text that was given."""

    values: dict[str, Any]
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[str, Problem]] = field(default_factory=list)

    def apply(self, argument: str) -> None:
        name, equals, text = argument.partition("=")
        path = _key_path(name)
        if not equals or not path or name.startswith("-"):
            said = shown(name.lstrip("-") or argument)
            self.problems.append((said, Problem((), "an override is key=value, like kl.beta=0.1, without dashes")))
            return
        try:
            value = _value(text)
            self._set(path, value)
        except UserError as error:
            self.problems.append((name, Problem(path, str(error))))
            return
        self.texts[path] = text

    def _set(self, path: KeyPath, value: Any) -> None:
        here: Any = self.values
        for depth, key in enumerate(path[:-1]):
            here = _enter(here, key, path[: depth + 1], [] if isinstance(path[depth + 1], int) else {})
        _enter(here, path[-1], path, value)
        here[path[-1]] = value

    def words_where_text_is_wanted(self) -> None:
        """``run.name=7`` is a name: where the schema wants text, the text as typed is taken."""
        for path, errors in schema_errors(self.values).items():
            if path in self.texts and any(error["type"] == "string_type" for error in errors):
                self._set(path, self.texts[path])


def _build(document: Document, overrides: Sequence[str], name: str, places: Sequence[Rule]) -> Recipe:
    values = copy.deepcopy(document.value)
    applied = _Overrides(values)
    for argument in overrides:
        applied.apply(argument)
    applied.words_where_text_is_wanted()
    _pin(values)
    checked = check(values, [*RULES, *places])
    secret = tuple(secrets(values))
    in_file = [problem for problem in document.problems if not _covered(problem.path, applied.texts)]
    said = {problem.path for problem in (*in_file, *secret)}
    problems = [*in_file, *secret, *(problem for problem in checked.problems if problem.path not in said)]
    lines = [f"override {key}: {problem.message}" for key, problem in applied.problems]
    lines = [*_lines(problems, document.lines, applied.texts, name), *lines]
    if lines or checked.recipe is None:
        raise UserError("\n".join(lines))
    return checked.recipe


def _pin(values: dict[str, Any]) -> None:
    """Writes the keys that the objective's name stands for (``remax`` is a baseline) over what the recipe says."""
    name = values.get("objective")
    chosen = OBJECTIVES.get(name) if isinstance(name, str) else None
    for key, value in (chosen.pins if chosen is not None else {}).items():
        section, _, entry = key.partition(".")
        here = values.get(section) or {}
        if isinstance(here, dict):  # anything else is an error of its own
            values[section] = {**here, entry: value}


def _lines(problems: Iterable[Problem], marks: Mapping[KeyPath, int], texts: Iterable[KeyPath], name: str) -> list[str]:
    located = []
    for problem in problems:
        key = ".".join(_key_shown(part) for part in problem.path)
        origin = next((path for path in texts if problem.path[: len(path)] == path), None)
        if origin is not None:
            located.append((10**9, f"override {key}: {problem.message}"))
            continue
        line = problem.line or _line_of(problem.path, marks)
        where = f"{name}:{line}" if line else name
        located.append((line or 0, f"{where}: {key}: {problem.message}" if key else f"{where}: {problem.message}"))
    return list(dict.fromkeys(text for _, text in sorted(located, key=lambda entry: entry[0])))


def _key_shown(key: str | int) -> str:
    return str(key) if isinstance(key, int) or re.fullmatch(r"[\w-]{1,60}", key) else shown(key)


def _line_of(path: KeyPath, marks: Mapping[KeyPath, int]) -> int | None:
    """The line of the key, or of the nearest section around it, or of the objective that asks for it."""
    while path and path not in marks:
        path = path[:-1]
    return marks.get(path or ("objective",), marks.get(()))


def _covered(path: KeyPath, texts: Iterable[KeyPath]) -> bool:
    return any(path[: len(key)] == key for key in texts)


def _key_path(name: str) -> KeyPath:
    parts = name.strip().split(".")
    return () if "" in parts else tuple(int(part) if part.isdecimal() else part for part in parts)


def _value(text: str) -> Any:
    """The value of an override: YAML where it starts like a list, a section or a quoted text, else a plain scalar."""
    if not text.startswith(("[", "{", '"', "'")):
        return plain(text)
    document = read_text(f"value: {text}", "value")
    if document.problems:
        raise UserError(document.problems[0].message)
    return document.value["value"]


def _enter(here: Any, key: str | int, path: KeyPath, missing: Any) -> Any:
    """The entry ``key`` of a section or list, made where it is missing. Raises UserError that names the way."""
    around = ".".join(map(str, path[:-1])) or "the recipe"
    if isinstance(here, list):
        if not isinstance(key, int):
            raise UserError(f"{around} is a list of {len(here)}; name the entry by number, like {around}.0.{key}")
        if key > len(here):
            raise UserError(f"{around} has {len(here)} entries; the next one is {around}.{len(here)}")
        if key == len(here):
            here.append(missing)
    elif not isinstance(here, dict):
        raise UserError(f"{around} is {shown(here)}, which has no keys")
    elif isinstance(key, int):
        raise UserError(unknown_key((*path[:-1], str(key))))
    elif here.get(key) is None:
        here[key] = missing
    return here[key]
