"""A working directory with a model folder, rows on disk, and the outputs that the shipped recipes read."""

from __future__ import annotations

from pathlib import Path

import pytest


def model_folder(path: Path, context: int = 2048) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(f'{{"max_position_embeddings": {context}}}')
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: ``model/``, ``small/`` (32 positions), ``rows.jsonl``."""
    model_folder(tmp_path / "model")
    model_folder(tmp_path / "small", context=32)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path
