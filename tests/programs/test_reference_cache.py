"""The reference's log-probabilities of the data's pairs: the same numbers as without a cache, and computed once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.examples import Preference
from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.layout import Rows, plain_rows
from rlhf.models.policy import ScoredModel
from rlhf.models.reference import FrozenReference
from rlhf.models.scratch import train_tokenizer
from rlhf.programs.reference_cache import ReferenceCache, row_digests, weights_digest
from rlhf.programs.streams import ShuffledPairs, by_prompt
from rlhf.rollout import Prompt
from rlhf.runtime import microbatches
from tests.support import alone, tiny_lm

WORDS = ("red", "green", "blue", "grey", "black")


@dataclass
class Counting:
    """A reference that counts its forwards."""

    inner: FrozenReference
    forwards: int = 0

    def stats(self, rows: Rows, request: StatsRequest) -> TokenStats:
        self.forwards += 1
        return self.inner.stats(rows, request)

    def states(self, rows: Rows) -> Any:
        raise AssertionError("nobody asked for the exact KL")

    def use(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def follow(self, step: int) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([f"name {word} and more {word}" for word in WORDS] * 8, 300)


def pairs(tokenizer: Any, epochs: tuple[int, ...] = (0, 0)) -> ShuffledPairs:
    """Five prompts, two a step; ``epochs``: which replies each epoch has (labelled text is paired anew)."""

    def prompts(epoch: int) -> Any:
        reply = f"and {epochs[epoch]}"
        rows = [
            Preference(Prompt(row_id=i, text=f"name {w}"), f"{w} more", f"{w} {reply}") for i, w in enumerate(WORDS)
        ]
        return by_prompt(rows)

    return ShuffledPairs(epoch_prompts=prompts, per_epoch=5, per_step=2, seed=3, own=slice(0, 2), tokenizer=tokenizer)


def reference(seed: int = 0) -> Counting:
    return Counting(FrozenReference(ScoredModel(tiny_lm(seed))))


def cache(stream: ShuffledPairs, model: Counting) -> ReferenceCache:
    return ReferenceCache(stream, model, 64, alone())


def digest(model: Counting) -> str:
    return weights_digest(model.inner.model.causal_lm, torch.float32)


def test_a_step_has_what_a_forward_of_it_says(tokenizer: Any, tmp_path: Path) -> None:
    """To the last bit: it was computed in the step's own microbatches."""
    stream, model = pairs(tokenizer), reference()
    filled = cache(stream, model)
    filled.fill(tmp_path, digest(model), 3, lambda text: None)
    for step in (1, 2, 3):
        batch = stream.at(step)
        found = microbatches.score(batch, lambda part: model.stats(plain_rows(part), StatsRequest()), 64)
        assert torch.equal(filled.at(step).ref_logprobs, found.logprobs)
        assert torch.equal(filled.at(step).completion_ids, batch.completion_ids)


def test_the_next_run_reads_it(tokenizer: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    first, again = reference(), reference()
    before = cache(pairs(tokenizer), first)
    before.fill(tmp_path, digest(first), 3, notes.append)
    after = cache(pairs(tokenizer), again)
    after.fill(tmp_path, digest(again), 3, notes.append)
    assert first.forwards > 0 and again.forwards == 0
    assert "computed in" in notes[0] and "read from" in notes[1] and len(list(tmp_path.iterdir())) == 1
    for step in (1, 2, 3):
        assert torch.equal(before.at(step).ref_logprobs, after.at(step).ref_logprobs)
    assert again.forwards == 0


def test_other_content_is_another_file(tokenizer: Any, tmp_path: Path) -> None:
    stream, model = pairs(tokenizer), reference()
    for filled, weights, steps in (
        (cache(stream, model), digest(model), 3),
        (cache(stream, model), digest(reference(1)), 3),  # another reference
        (cache(stream, model), weights_digest(model.inner.model.causal_lm, torch.bfloat16), 3),
        (cache(stream, model), digest(model), 2),  # fewer rows
        (cache(pairs(tokenizer, (1, 1)), model), digest(model), 3),  # other replies
        (cache(replace(stream, seed=4), model), digest(model), 3),  # other batches
        (ReferenceCache(stream, model, 32, alone()), digest(model), 3),  # cut elsewhere
    ):
        filled.fill(tmp_path, weights, steps, lambda text: None)
    assert len(list(tmp_path.iterdir())) == 7


def test_what_is_not_there_is_computed_when_it_comes(tokenizer: Any, tmp_path: Path) -> None:
    stream, model = pairs(tokenizer, (0, 1)), reference()
    filled = cache(stream, model)
    filled.fill(tmp_path, digest(model), 100, lambda text: None)
    assert len({key for step in (1, 2, 3) for key in row_digests(stream.at(step))}) == len(filled.known)
    forwards = model.forwards
    batch = filled.at(4)  # wholly in the second epoch, which has other replies
    assert model.forwards > forwards
    assert torch.equal(cache(stream, model).at(4).ref_logprobs, batch.ref_logprobs)  # whatever came before it
    found = microbatches.score(stream.at(4), lambda part: model.stats(plain_rows(part), StatsRequest()), 64)
    torch.testing.assert_close(batch.ref_logprobs, found.logprobs, rtol=0, atol=1e-6)


def test_another_configuration_is_another_file() -> None:
    """The same weights under another rope_theta are another function."""
    lm = tiny_lm()
    before = weights_digest(lm, torch.float32)
    assert weights_digest(tiny_lm(), torch.float32) == before
    lm.config.rope_parameters = {**(lm.config.rope_parameters or {}), "rope_theta": 77.0}
    assert weights_digest(lm, torch.float32) != before


def test_a_folder_that_cannot_be_written_costs_a_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, notes = reference(), list[str]()
    filled = cache(pairs(tokenizer), model)
    filled.fill(tmp_path / "file", digest(model), 3, notes.append)
    assert "could not be kept" in notes[1] and filled.at(1).ref_logprobs.any()


def test_a_broken_file_is_made_again(tokenizer: Any, tmp_path: Path) -> None:
    model, notes = reference(), list[str]()
    cache(pairs(tokenizer), model).fill(tmp_path, digest(model), 3, notes.append)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    cache(pairs(tokenizer), model).fill(tmp_path, digest(model), 3, notes.append)
    assert "computed in" in notes[1] and path.read_bytes() == whole
