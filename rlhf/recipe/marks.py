"""YAML text → plain values with the line of every key; what YAML leaves to the reader's luck is refused here.

Scalars follow YAML 1.2 (``1e-6`` is a number). Plain words that YAML 1.1 and 1.2 read differently (``no``, ``010``,
``1:30``, dates) are problems, because other tools will read the same file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UserError
from rlhf.recipe.wording import shown

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 10_000  # after aliases are expanded: ten lines of aliases can stand for a billion values
MAX_DEPTH = 32

_STR_TAG = "tag:yaml.org,2002:str"
_DEFAULT_TAGS = {_STR_TAG, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TWO_READINGS = {
    "a truth value to YAML 1.1 and a word to YAML 1.2: write true or false": re.compile(
        r"y|Y|n|N|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
    ),
    "octal to some YAML readers and decimal to others: write it without the leading 0": re.compile(
        r"[-+]?0[0-9_]+|[-+]?0[ob][0-9_]+"
    ),
    "a number to some YAML readers and text to others: write it without `_`": re.compile(
        r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?"
    ),
    "a base-60 number to YAML 1.1 and text to YAML 1.2: write one number": re.compile(
        r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
    ),
    "a date to YAML 1.1 and text to YAML 1.2: put it in quotes": re.compile(
        r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"
    ),
}


@dataclass(frozen=True)
class Problem:
    """One thing to correct. ``path``: keys from the top. ``line`` counts from 1; None = not in the file."""

    path: KeyPath
    message: str
    line: int | None = None


@dataclass(frozen=True)
class Document:
    """What a file says: its values, the line of every key path, and what is wrong with it as YAML."""

    value: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...] = ()


def read_file(file: Path) -> Document:
    """Reads a YAML file. Raises UserError where it cannot be read or parsed at all."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: larger than {MAX_BYTES:,} bytes; a recipe is a page of text")
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise UserError(f"{file}:{line}: {message}") from error
    return read_text(text, str(file))


def read_text(text: str, name: str) -> Document:
    """Parses YAML text; ``name`` stands for it in messages. Raises UserError."""
    root = _compose(text, name)
    if root is None:
        raise UserError(f"{name}:1: is empty; a recipe has at least `objective: …` and `run: {{name: …}}`")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UserError(f"{name}:{_line(root)}: is {kind} at the top; a recipe is `key: value` lines")
    builder = _Builder(name)
    value = builder.build(root, (), ())
    return Document(value, builder.lines, tuple(builder.problems))


def plain(text: str) -> Any:
    """The value of an unquoted scalar (YAML 1.2 core schema)."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.lower().replace(".", "", 1))
    return text


def two_readings(text: str) -> str | None:
    """How YAML versions disagree about an unquoted scalar; None where they agree."""
    return next((reading for reading, pattern in _TWO_READINGS.items() if pattern.fullmatch(text)), None)


def dump(value: Any) -> str:
    """YAML text that ``read_text`` and YAML 1.1 readers read back alike."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    pass


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    unsafe = plain(text) != text or two_readings(text) is not None
    return dumper.represent_scalar(_STR_TAG, text, style='"' if unsafe else None)


_Dumper.add_representer(str, _represent_text)


class _Composer(yaml.SafeLoader):
    """The node tree without any meaning given to plain scalars, and with limits on depth and size."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's way to say that all plain scalars are text
    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        if self.depth > MAX_DEPTH:
            raise _TooMuch(line, f"more than {MAX_DEPTH} levels deep; a recipe has four")
        if self.nodes > MAX_NODES:
            raise _TooMuch(line, f"more than {MAX_NODES:,} values; a recipe has about a hundred")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _TooMuch(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Composer(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except _TooMuch as error:
        raise UserError(f"{name}:{error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: {_syntax(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: character {error.character:#04x} is not allowed in YAML") from error


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if "\\t" in problem:
        return "a tab cannot indent YAML; use spaces"
    if "expected a single document" in context:
        return "a second document starts here (`---`); a recipe is one document"
    if error.context_mark and error.problem_mark and error.context_mark.line != error.problem_mark.line:
        context = f"{context} that starts in line {error.context_mark.line + 1}"
    return f"not YAML: {f'{context}, ' if context else ''}{problem}; look for a missing bracket, quote, colon or space"


@dataclass
class _Builder:
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    count: int = 0

    def build(self, node: yaml.Node, path: KeyPath, parents: tuple[int, ...]) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise UserError(f"{self.name}:{_line(node)}: aliases expand to more than {MAX_NODES:,} values")
        if id(node) in parents:
            raise UserError(f"{self.name}:{_line(node)}: an alias contains itself")
        self.lines.setdefault(path, _line(node))
        if node.tag not in _DEFAULT_TAGS:
            self.problem(node, path, f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not used in recipes")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*parents, id(node)))
        if isinstance(node, yaml.SequenceNode):
            inner = (*parents, id(node))
            return [self.build(entry, (*path, index), inner) for index, entry in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != _STR_TAG:
                self.problem(key_node, path, "a key must be a plain word")
            elif key == "<<":
                self.problem(key_node, path, "merge keys (`<<`) are not supported; write the keys out")
            elif key in result:
                first = self.lines[(*path, key)]
                self.problem(key_node, (*path, key), f"duplicate key, already set in line {first}; keep one of them")
            else:
                self.lines[(*path, key)] = _line(key_node)
                result[key] = self.build(value_node, (*path, key), parents)
        return result

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is not None:
            return node.value
        reading = two_readings(node.value)
        if reading is not None:
            self.problem(node, path, f"{shown(node.value)} is {reading}; in quotes it is the text")
        return plain(node.value)

    def problem(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(path, message, _line(node)))


def _integer(text: str) -> int | str:
    try:
        return int(text, 16) if text.startswith("0x") else int(text)
    except ValueError:  # Python refuses to read thousands of digits
        return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
