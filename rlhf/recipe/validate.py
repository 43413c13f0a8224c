"""Values → a recipe, with every schema error and every broken rule in one go.

Rules read a recipe, but a recipe with a schema error cannot be built. So the wrong values are taken out, the rest is
built, and a rule that asks for a value that was taken out says nothing.
"""

from __future__ import annotations

import contextlib
import copy
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from rlhf.recipe import wording
from rlhf.recipe.marks import KeyPath, Problem
from rlhf.recipe.schema import Recipe
from rlhf.recipe.sections import Section

Rule = Callable[[Recipe], Iterable[Problem]]


def registrar(rules: list[Rule]) -> Callable[[Rule], Rule]:
    """A decorator that adds a function to these rules."""

    def register(rule: Rule) -> Rule:
        rules.append(rule)
        return rule

    return register


@dataclass(frozen=True)
class Checked:
    """A recipe as far as it could be built, and what is wrong with it. ``recipe`` is None where anything is wrong."""

    recipe: Recipe | None
    problems: tuple[Problem, ...]


def check(values: dict[str, Any], rules: Iterable[Rule]) -> Checked:
    """Validates values against the schema and the rules."""
    errors = schema_errors(values)
    schema_problems = tuple(_explain(path, group) for path, group in errors.items())
    view = _as_far_as_possible(values, errors)
    problems = (*schema_problems, *(problem for rule in rules for problem in _apply(rule, view)))
    return Checked(None if problems else cast(Recipe, view), problems)


def schema_errors(values: dict[str, Any]) -> dict[KeyPath, list[dict[str, Any]]]:
    """pydantic's errors by the path of the value they are about; alternatives of a union share one path."""
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        grouped: dict[KeyPath, list[dict[str, Any]]] = {}
        for entry in error.errors():
            grouped.setdefault(_real_path(entry["loc"], values), []).append(dict(entry))
        return grouped
    return {}


def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The schema class of the section at ``path``; list indices count as their element."""
    here: type[BaseModel] | None = Recipe
    for key in path:
        if isinstance(key, int):
            continue
        field = here.model_fields.get(key) if here else None
        here = _model_in(field.annotation) if field else None
    return here


@cache
def sections_of_keys() -> dict[str, tuple[str, ...]]:
    """Key → dotted sections that have it, the whole schema over."""
    places: dict[str, tuple[str, ...]] = {}
    for section, model in _walk(Recipe, ""):
        for key in model.model_fields:
            places[key] = (*places.get(key, ()), section)
    return places


def unknown_key(path: KeyPath) -> str:
    """Message for a key that the schema does not have."""
    section = section_at(path[:-1])
    return wording.unknown_key(str(path[-1]), section.model_fields if section else (), sections_of_keys())


def _explain(path: KeyPath, errors: list[dict[str, Any]]) -> Problem:
    if errors[0]["type"] == "extra_forbidden":
        return Problem(path, unknown_key(path))
    words = [wording.schema_error(error, _description(path)) for error in _one_choice(errors)]
    return Problem(path, " or ".join(dict.fromkeys(words)))


def _one_choice(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A name of ours or code of one's own: two alternatives of the schema, one list of choices for the reader."""
    by_type = {error["type"]: error for error in errors}
    if set(by_type) != {"literal_error", "string_pattern_mismatch"}:
        return errors
    expected = f"{by_type['literal_error']['ctx']['expected']} or 'package.module:Class'"
    return [by_type["literal_error"] | {"ctx": {"expected": expected}}]


def _description(path: KeyPath) -> str | None:
    names = [key for key in path if isinstance(key, str)]
    section = section_at(tuple(names[:-1])) if names else None
    field = section.model_fields.get(names[-1]) if section else None
    return field.description if field else None


def _real_path(location: Iterable[str | int], values: Any) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the recipe."""
    path: list[str | int] = []
    here, last = values, None
    for key in location:
        if not _holds(here, key):
            last = key
            break
        path.append(key)
        here = here[key]
    if last is not None and isinstance(here, dict):
        path.append(last)
    return tuple(path)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{prefix}.{name}" if prefix else name)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)


class Unknown(Exception):
    """A rule asked for a value that is itself wrong."""


class _Partial:
    """A section whose wrong values raise Unknown when a rule asks for them."""

    def __init__(self, section: Section, wrong: dict[str, Any]) -> None:
        self._section, self._wrong = section, wrong

    def __getattr__(self, name: str) -> Any:
        if name not in self._wrong:
            return getattr(self._section, name)
        if self._wrong[name] is None:
            raise Unknown(name)
        return self._wrong[name]


def _apply(rule: Rule, recipe: Any) -> list[Problem]:
    found: list[Problem] = []
    with contextlib.suppress(Unknown):
        found.extend(rule(recipe))  # what came before the unknown value is kept
    return found


def _as_far_as_possible(values: dict[str, Any], errors: dict[KeyPath, list[dict[str, Any]]]) -> Any:
    """The recipe, or a view of it in which wrong values raise Unknown. Wrong below two levels = the whole list."""
    kept = copy.deepcopy(values)
    wrong: dict[str, set[str] | None] = {}
    for path, group in errors.items():
        if group[0]["type"] == "extra_forbidden":
            _remove(kept, path)
        elif path:
            _remove(kept, path[:2])
            if len(path) == 1:
                wrong[str(path[0])] = None
            elif wrong.get(str(path[0]), set()) is not None:
                wrong.setdefault(str(path[0]), set()).add(str(path[1]))  # type: ignore[union-attr]
    if not wrong:
        return Recipe.model_validate(kept)
    _fill_required(kept)
    recipe = Recipe.model_validate(kept)
    views: dict[str, Any] = {}
    for name, fields in wrong.items():
        inner = getattr(recipe, name, None)
        views[name] = None if fields is None or inner is None else _Partial(inner, dict.fromkeys(fields))
    return _Partial(recipe, views)


def _fill_required(values: dict[str, Any]) -> None:
    values.setdefault("objective", "reinforce")
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", "unnamed")


def _remove(values: Any, path: Sequence[Any]) -> None:
    for key in path[:-1]:
        if not _holds(values, key):
            return
        values = values[key]
    if isinstance(values, dict):
        values.pop(path[-1], None)


def _holds(value: Any, key: str | int) -> bool:
    return (isinstance(value, dict) and key in value) or (isinstance(value, list) and isinstance(key, int))
