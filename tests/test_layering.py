"""Arrows point down only (docs/architecture.md): who may import whom, read from the source and tried out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf"

# Whoever adds a module or package next to these decides its level here.
LEVELS = {
    "errors": 0,
    "locate": 0,
    "maths": 0,
    "rollout": 1,
    "interfaces": 1,
    "objectives": 2,
    "models": 3,
    "sampling": 3,
    "rewards": 3,
    "data": 3,
    "tracking": 3,
    "runtime": 3,
    "planning": 3,
    "programs": 4,
    "assemble": 4,
    "recipe": 5,
    "spawn": 6,
    "shipped": 6,
    "cli": 6,
    "__init__": 6,
    "__main__": 7,
}
READS_THE_RECIPE = {"recipe", "programs", "assemble", "cli", "shipped", "__init__", "__main__"}
RECIPE_MAY_IMPORT = ("rlhf.errors", "rlhf.locate", "rlhf.objectives.presets", "rlhf.data.kinds", "rlhf.recipe")
TORCH_FREE = (
    *("rlhf", "rlhf.recipe", "rlhf.cli", "rlhf.spawn", "rlhf.shipped"),
    *("rlhf.errors", "rlhf.locate", "rlhf.objectives.presets", "rlhf.data.kinds"),
)
HEAVY = (
    *("torch", "transformers", "datasets", "pyarrow", "accelerate", "deepspeed", "peft", "wandb", "matplotlib"),
    "numpy",
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    """``rlhf/models/head.py`` → ``models``, ``rlhf/errors.py`` → ``errors``."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module the file imports, at any depth, as an absolute dotted name (``from a import b`` gives ``a.b``)."""
    package = ["rlhf", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def internal(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, component) of each import from this package; ``from rlhf import train`` is of ``__init__``."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "rlhf":
            known = len(parts) > 1 and parts[1] in LEVELS
            yield name, parts[1] if known else "__init__"


def test_every_part_has_a_level() -> None:
    assert {component(path) for path in sources()} <= LEVELS.keys()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_goes_up(path: Path) -> None:
    own = component(path)
    for name, other in internal(path):
        if other == "recipe":
            assert own in READS_THE_RECIPE, f"{own} imports {name}: level 3 and below takes plain values"
        elif own == "recipe":
            assert name.startswith(RECIPE_MAY_IMPORT), f"recipe imports {name}"
        else:
            assert LEVELS[other] <= LEVELS[own], f"{own} (level {LEVELS[own]}) imports {name} (level {LEVELS[other]})"


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if LEVELS.get(component(path), 9) <= 2],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_levels_0_to_2_know_torch_and_nothing_else(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)} - {*sys.stdlib_module_names, "rlhf", "torch"}
    assert not foreign
    if component(path) == "maths":
        assert {other for _, other in internal(path)} <= {"maths"}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_level_0_imports_with_only_torch_installed() -> None:
    names = [f"rlhf.maths.{path.stem}" for path in (PACKAGE / "maths").glob("[a-z]*.py")]
    assert len(names) >= 7
    run(
        f"""
import sys, torch  # torch's own dependencies are loaded here

class OnlyTorch:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("rlhf", "torch"):
            raise ImportError("not installed: " + name)

sys.meta_path.insert(0, OnlyTorch())
import importlib
for name in {names!r}:
    importlib.import_module(name)
"""
    )


@pytest.mark.parametrize("module", TORCH_FREE)
def test_reading_a_recipe_needs_no_torch(module: str) -> None:
    """A typo in a recipe is reported in under half a second, which importing torch alone would take."""
    run(f"import sys, {module}\nheavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy")
