"""What an installed copy holds, and that the files that describe the project agree with each other."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhf import locate

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("recipes", "accelerate_configs")


@pytest.fixture(scope="module")
def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_package_is_listed(settings: configparser.ConfigParser) -> None:
    """`packages` is written by hand because two folders beside the package are mapped into it."""
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "rlhf").rglob("__init__.py")}
    mapped = {f"rlhf.{name}" for name in SHIPPED}
    assert set(settings["options"]["packages"].split()) == found | mapped, "correct `packages` in setup.cfg"


def test_torch_is_bounded_and_names_no_build(settings: configparser.ConfigParser) -> None:
    """An unbounded torch installs gigabytes of another build over the one that is there; `+cpu` exists in one place."""
    (torch,) = re.findall(r"^torch(\S+)$", settings["options"]["install_requires"], re.MULTILINE)
    assert torch == ">=2.11,<2.14"
    assert set(settings["options.extras_require"]) >= {"dev", "serve", "vllm", "track", "docs"}


def test_the_set_up_is_keyed_by_its_requirements() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "cat setup.cfg pyproject.toml | cksum" in makefile
    for target in ("quickstart", "test", "check"):
        assert f"\n{target}: $(STAMP)\n" in makefile, f"make {target} must work on a bare machine"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_shipped_folders_are_found_in_a_clone_and_in_site_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate.shipped_folder("recipes") == ROOT / "recipes"
    installed = tmp_path / "site-packages" / "rlhf"
    (installed / "recipes" / "a").mkdir(parents=True)
    (installed / "recipes" / "a" / "b.yaml").write_text("x: 1\n")
    (tmp_path / "site-packages" / "recipes").mkdir()  # a stranger's package of that name
    monkeypatch.setattr(locate, "_PACKAGE", installed)
    assert locate.shipped_recipes() == {"a/b": installed / "recipes" / "a" / "b.yaml"}


@pytest.mark.slow
def test_a_wheel_holds_recipes_configurations_and_code(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("rlhf", *SHIPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("rlhf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "rlhf").rglob("*.*") if file.suffix != ".pyc"}
    shipped = {f"rlhf/{file.relative_to(ROOT)}" for name in SHIPPED for file in (ROOT / name).rglob("*.yaml")}
    assert "rlhf/py.typed" in code and code | shipped <= held
    assert not [name for name in held if name.startswith(("tests/", "docs/", "recipes/"))]
    listed = subprocess.run(
        [sys.executable, "-c", "from rlhf.locate import shipped_recipes; print(*shipped_recipes())"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "installed",
        timeout=60,
    )
    assert "quickstart/reinforce" in listed.stdout.split()
