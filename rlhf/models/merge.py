"""Several transformers folders of one shape averaged into another, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.errors import UserError

# What says which texts a token id stands for, and how many there are: averages over different ones mean nothing.
_SAME = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "num_labels")
_NOT_COPIED = ("*.safetensors", "*.bin", "*.pt", "README.md", "adapter")  # an average is no adapter
_INDEX = "model.safetensors.index.json"
_LOCAL = "rlhf merge reads folders of weights, such as `runs/my-run-reward/final`"


@dataclass(frozen=True)
class Folder:
    """A transformers folder: where each tensor lies. Raises UserError for a folder without weights of its own."""

    path: Path
    files: Mapping[str, Path]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, path: str) -> Folder:
        from safetensors import safe_open

        place = Path(path)
        if not (place / "config.json").is_file():
            adapter = (place / "adapter_config.json").is_file()
            what = f"is an adapter; first `rlhf merge {path} --output …`" if adapter else "is no model's folder"
            raise UserError(f"{path}: {what}; {_LOCAL}")
        files: dict[str, Path] = {}
        for file in sorted(place.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                files |= {name: file for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if not files:
            raise UserError(f"{path}: holds no safetensors weights; {_LOCAL}")
        if _is_tied(place):
            files.pop("lm_head.weight", None)  # some programs write the embeddings under this name once more
        return cls(place, files, json.loads((place / "config.json").read_text(encoding="utf-8")))

    def refuse_stranger(self, other: Folder) -> None:
        """Raises UserError where the other's tensors could not be averaged with these."""
        odd = sorted(set(self.files) ^ set(other.files))
        if odd:
            raise UserError(f"{other.path}: not the tensors of {self.path} (first differences: {', '.join(odd[:3])})")
        for key in _SAME:
            if self.config.get(key) != other.config.get(key):
                told = f"{key} is {other.config.get(key)}, and {self.path} has {self.config.get(key)}"
                raise UserError(f"{other.path}: {told}; averages are of models that were trained from one start")
        if _vocabulary(self.path) != _vocabulary(other.path):
            raise UserError(
                f"{other.path}: has another vocabulary than {self.path}, so its embeddings mean other words"
            )


def merge(
    folders: Sequence[Folder],
    out: Path,
    combine: Callable[[Sequence[Tensor]], Tensor],
    *,
    card: str,
    config: Mapping[str, Any],
) -> None:
    """Writes ``combine`` of every tensor into a folder like the first one, whole or not at all.

    combine: the folders' tensors of one name, in their order → the new one, which is stored in the first one's type.
    config: entries of ``config.json`` that differ from the first one's.
    """
    first = folders[0]
    with _staged(out) as staging:
        shutil.copytree(first.path, staging, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        with _opened(folders) as read:
            for file in sorted(set(first.files.values())):
                _write(staging / file.name, [n for n, at in first.files.items() if at == file], read, combine)
        if (staging / _INDEX).is_file():
            _write_json(staging / _INDEX, _index(first))
        _write_json(staging / "config.json", {**first.config, **config})
        (staging / "README.md").write_text(card, encoding="utf-8")


def _index(folder: Folder) -> dict[str, Any]:
    """Which file holds which tensor, without those that were left out."""
    stored: dict[str, Any] = json.loads((folder.path / _INDEX).read_text(encoding="utf-8"))
    return {**stored, "weight_map": {name: file.name for name, file in folder.files.items()}}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` where all went well, and is gone where it did not."""
    staging = out.with_name(f".staging-{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(
    file: Path,
    names: Sequence[str],
    read: Callable[[str], list[Tensor]],
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> None:
    from safetensors.torch import save_file

    merged: dict[str, Tensor] = {}
    for name in names:
        parts = read(name)
        if len({tuple(part.shape) for part in parts}) > 1:
            raise UserError(f"{name} has the shapes {[tuple(part.shape) for part in parts]}, and one is needed")
        merged[name] = combine(parts).to(parts[0].dtype).contiguous() if parts[0].is_floating_point() else parts[0]
    save_file(merged, file, metadata={"format": "pt"})


@contextmanager
def _opened(folders: Sequence[Folder]) -> Iterator[Callable[[str], list[Tensor]]]:
    """Reads one tensor of every folder by name."""
    from safetensors import safe_open

    with ExitStack() as stack:
        handles = [
            {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(folder.files.values())}
            for folder in folders
        ]
        yield lambda name: [
            opened[folder.files[name]].get_tensor(name) for folder, opened in zip(folders, handles, strict=True)
        ]


def _is_tied(path: Path) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(path).get_text_config().tie_word_embeddings)


def _vocabulary(path: Path) -> Any:
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab")
