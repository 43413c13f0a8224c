"""The language model that rank tests of whole runs start from."""

from __future__ import annotations

from pathlib import Path

from rlhf.data import quickstart
from rlhf.models.scratch import build_causal_lm, build_config, train_tokenizer


def write(place: Path, recipe: str) -> None:
    """``recipe.yaml`` and ``start/``: a Gemma of one layer with its tokenizer."""
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    texts = [turn["content"] for row in quickstart.demonstrations()[:200] for turn in row["messages"]]
    tokenizer = train_tokenizer(texts, 512)
    config = build_config("gemma", layers=1, hidden_size=32, heads=2, vocab_size=len(tokenizer))
    build_causal_lm(config, seed=3).save_pretrained(place / "start")
    tokenizer.save_pretrained(place / "start")
