"""log π_ref of the data's pairs, computed once before training, and kept beside the runs by a hash of its content.

A later run with the same reference, rows and batches (another β, another learning rate) reads the file. Batches are
part of the name because two layouts of one row agree to rounding only, and a run must not depend on who ran before it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.interfaces import StatsRequest, TokenStats
from rlhf.models.layout import Layout, plain_rows
from rlhf.models.load import base_model
from rlhf.models.quantized import statistics
from rlhf.models.reference import Reference
from rlhf.objectives.dpo import ReferencedPairs
from rlhf.objectives.supervised import PairBatch
from rlhf.programs.streams import ShuffledPairs
from rlhf.rollout import TokenBatch
from rlhf.runtime import microbatches
from rlhf.runtime.distributed import Runtime

Digest = bytes
_DIGEST_BYTES = 16
_ARITHMETIC = 2  # one more where a batch is cut otherwise, or the head sums otherwise: what was kept is then made anew


@dataclass(frozen=True)
class ReferenceCache:
    """A step's pairs with the reference's log-probabilities at temperature 1.

    known: of each completion (prompt and completion ids, hashed) its [length] nats. A completion that is not there
    (labelled text is paired anew each epoch) is computed when it comes, each time: what a step reads does not depend on
    the steps before it.
    """

    pairs: ShuffledPairs
    reference: Reference
    microbatch_tokens: int
    runtime: Runtime
    layout: Layout = plain_rows
    known: dict[Digest, Tensor] = field(default_factory=dict)

    def at(self, step: int) -> ReferencedPairs:
        batch = self.pairs.at(step).to(self.runtime.device)
        digests = row_digests(batch)
        missing = torch.tensor(any(digest not in self.known for digest in digests), device=self.runtime.device)
        found = self.known
        if int(self.runtime.max(missing.long())):  # every rank computes or none: forwards may be collective
            found = {**self._compute(batch, digests), **self.known}
        return _with(batch, [found[digest] for digest in digests])

    def _compute(self, batch: PairBatch, digests: list[Digest]) -> dict[Digest, Tensor]:
        def forward(part: TokenBatch) -> TokenStats:
            return self.reference.stats(self.layout(part), StatsRequest())

        with self.reference.use():
            found = microbatches.score(batch, forward, self.microbatch_tokens, self.runtime, self.layout.cells)
        rows = zip(digests, found.logprobs, batch.completion_mask, strict=True)
        return {digest: row[mask].cpu() for digest, row, mask in rows}

    def fill(self, folder: Path, weights: str, steps: int, note: Callable[[str], None]) -> None:
        """The completions of a run's ``steps``, of its first epoch at most: from the file of that name in ``folder``,
        or computed and written there.

        weights: ``weights_digest`` of the reference. Every rank calls it.
        """
        epoch = -(-self.pairs.per_epoch // self.pairs.per_step)
        places = range(1, min(steps, epoch) + 1)
        path = folder / f"{self._name(weights, places)}.safetensors"
        if self._read(path):
            note(f"reference: log-probabilities of {len(self.known)} completions read from {path}")
            return
        started = time.monotonic()
        computed: dict[Digest, Tensor] = {}
        for step in places:
            batch = self.pairs.at(step).to(self.runtime.device)
            computed = {**self._compute(batch, row_digests(batch)), **computed}
        for part in self.runtime.gather_objects(computed):
            self.known.update(part)
        seconds = time.monotonic() - started
        note(f"reference: log-probabilities of {len(self.known)} completions computed in {seconds:.0f} s")
        if self.runtime.main:
            try:
                _write(path, self.known)
            except (OSError, SafetensorError) as error:
                note(f"they could not be kept for the next run in {path}: {error}")

    def _name(self, weights: str, steps: Iterable[int]) -> str:
        """What the content depends on: weights, rows in their batches, how those are cut, and how they are summed."""
        setting = (_ARITHMETIC, weights, self.microbatch_tokens, self.runtime.world_size, type(self.layout).__name__)
        digest = hashlib.sha256(repr(setting).encode())
        for step in steps:
            digest.update(b"".join(row_digests(self.pairs.at(step))) + b"\0")
        return hashlib.sha256("".join(self.runtime.gather_objects(digest.hexdigest())).encode()).hexdigest()[:32]

    def _read(self, path: Path) -> bool:
        """Every rank reads, or none: a file that one of them cannot read is made anew."""
        try:
            found = _load(path) if path.is_file() else {}
        except Exception:  # safetensors has errors of its own; whatever is wrong with the file, it can be made again
            found = {}
        absent = torch.tensor(not found, device=self.runtime.device).long()
        if int(self.runtime.max(absent)):
            return False
        self.known.update(found)
        return True


def row_digests(batch: PairBatch) -> list[Digest]:
    """A hash of each row's prompt and completion ids, padding aside."""
    found = []
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]].cpu()
        completion = batch.completion_ids[row][batch.completion_mask[row]].cpu()
        ids = torch.cat([torch.tensor([len(prompt)]), prompt, completion]).numpy().tobytes()
        found.append(hashlib.sha256(ids).digest()[:_DIGEST_BYTES])
    return found


def weights_digest(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 over what a forward depends on: configuration, attention kernel, compute type, device, library versions,
    and the names and bytes of everything that is not an adapter's; quantized weights with what they are read with."""
    config = cast(Any, base_model(model)).config
    kernel = getattr(config, "_attn_implementation", None)
    device = next(model.parameters()).device.type
    setting = (config.to_json_string(), kernel, dtype, device, torch.__version__, transformers.__version__)
    digest = hashlib.sha256(repr(setting).encode())
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer.", ".").encode())
            for part in (parameter, *statistics(parameter)):
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _with(batch: PairBatch, rows: list[Tensor]) -> ReferencedPairs:
    logprobs = torch.zeros(batch.completion_ids.shape, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        logprobs[index, : len(row)] = row
    known = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return ReferencedPairs(**known, ref_logprobs=logprobs.to(batch.group.device))


def _write(path: Path, known: dict[Digest, Tensor]) -> None:
    """Whole or not at all: other runs may look for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.part")  # runs of one sweep may write the same file at once
    digests = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8).view(-1, _DIGEST_BYTES)
    lengths = torch.tensor([len(row) for row in known.values()])
    save_file({"digests": digests, "lengths": lengths, "logprobs": torch.cat(list(known.values()))}, staged)
    staged.replace(path)


def _load(path: Path) -> dict[Digest, Tensor]:
    found = load_file(path)
    rows = torch.split(found["logprobs"], found["lengths"].tolist())
    return {bytes(key.tolist()): row for key, row in zip(found["digests"], rows, strict=True)}
