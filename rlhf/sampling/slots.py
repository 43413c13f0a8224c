"""Keys and values of the rows that are being decoded, in buffers that are allocated once.

A row fills its slot from column 0. Rows in use are kept together, so attention reads views of the buffers; a row that
leaves is overwritten by the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]


class Captured:
    """What a prefill leaves behind: keys and values of each layer, [P, H, L, D]. Stands in for a transformers cache."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> Layer:
        self.layers.append((keys, values))
        return keys, values


class Slots:
    """Stands in for a transformers cache while one token of each row is decoded.

    size: most rows at once. width: most columns of a row. rows: how many are in use. lengths [size]: columns filled.
    """

    is_compileable = False

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.size, self.width, self.rows, self.used = size, width, 0, 0
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.places = torch.arange(size, device=device)
        self.written = self.places  # of a step: where its columns lie, row by row and head by head
        self.layers: list[Layer] = []

    def admit(self, captured: Captured, source: Tensor, lengths: Tensor) -> None:
        """New rows behind those in use: row i has the first ``lengths[i]`` columns of prompt ``source[i]``."""
        if not self.layers:
            self.layers = [(self._buffer(keys), self._buffer(values)) for keys, values in captured.layers]
        new = slice(self.rows, self.rows + len(source))
        for buffers, found in zip(self.layers, captured.layers, strict=True):
            for buffer, values in zip(buffers, found, strict=True):
                buffer[new, :, : values.shape[2]] = values[source]
        self.lengths[new] = lengths
        self.rows += len(source)

    def _buffer(self, like: Tensor) -> Tensor:
        """Zeros: a masked column's weight is 0, and 0 times what memory happens to hold may be NaN."""
        return like.new_zeros(self.size, like.shape[1], self.width, like.shape[3])

    def open(self) -> tuple[Tensor, int]:
        """Before a step: (the column that each row's token will fill [rows], how many columns attention will see)."""
        lengths = self.lengths[: self.rows]
        self.used = int(lengths.max()) + 1
        heads = self.layers[0][0].shape[1]
        place = self.places[: self.rows, None] * heads + torch.arange(heads, device=lengths.device)
        self.written = (place * self.width + lengths[:, None]).flatten()
        return lengths, self.used

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> Layer:
        """Writes one column a row; returns everything up to it, [rows, H, used, D]."""
        found = []
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            flat = buffer.view(-1, buffer.shape[3])
            flat.index_copy_(0, self.written, new.reshape(-1, buffer.shape[3]))
            found.append(buffer[: self.rows, :, : self.used])
        return found[0], found[1]

    def close(self) -> None:
        """After a step: its tokens are part of the rows."""
        self.lengths[: self.rows] += 1

    def release(self, done: Tensor) -> Tensor:
        """Lets rows go. done [rows] bool → [kept]: which of the old rows each of the remaining ones was."""
        kept = int((~done).sum())
        order = self.places[: self.rows].clone()
        holes = done[:kept].nonzero()[:, 0]
        movers = kept + (~done[kept:]).nonzero()[:, 0]
        order[holes] = movers
        if len(holes):
            filled = int(self.lengths[movers].max())
            for buffers in self.layers:
                for buffer in buffers:
                    buffer[holes, :, :filled] = buffer[movers, :, :filled]
        self.lengths[:kept] = self.lengths[order[:kept]]
        self.rows = kept
        return order[:kept]
