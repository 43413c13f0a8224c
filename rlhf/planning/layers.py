"""Bytes of a forward and a backward: what a decoder layer keeps, and what passes through it.

Per token unless a name says otherwise. H hidden, A all query heads, K all key heads, I the MLP's width, h heads, L the
width of a row. Tests compare the sums with what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.models.quantized import Bits
from rlhf.planning.shapes import Shape

Activations = Literal["keep", "recompute", "offload"]


@dataclass(frozen=True)
class Regime:
    """Bytes a number. stream: of the residual stream. product: of what matrix products read and return. copied: weights
    are float32 and every product casts them."""

    stream: int
    product: int
    copied: bool = False


FLOAT32 = Regime(4, 4)
AUTOCAST = Regime(4, 2, copied=True)  # float32 weights, bfloat16 products
BFLOAT16 = Regime(2, 2)  # a DeepSpeed engine's weights, or weights stored so


@dataclass(frozen=True)
class Forward:
    """One forward. rows × width cells, statistics at ``positions`` of them. masked: its mask is dense, [rows, width,
    width]; else rows are causal alone. shared: completions share their prompt's row."""

    rows: int
    width: int
    positions: int
    masked: bool = True
    shared: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def pairs(self) -> int:
        """Cells of one dense mask."""
        return self.rows * self.width**2


def kept_per_token(shape: Shape, regime: Regime, width: int, masked: bool, rank: int = 0) -> float:
    """What one layer keeps for backward, bytes a token. rank: of an adapter on all its linear layers."""
    h, p = shape.hidden, regime.product
    inputs = (5 if shape.gated else 4) if regime.copied else 2  # autocast casts its input for every product anew
    normed = 4 if rank else 8  # x in float32, and x/rms where the norm's own weight is trained
    norms = 2 * normed * h + inputs * p * h
    norms += 2 * normed * h if shape.sandwiched else 0
    norms += normed * (shape.queries + shape.keys) if shape.normed_queries else 0
    mlp = (4 if shape.gated else 2) * p * shape.intermediate
    adapter = 4 * rank * _LINEARS if rank else 0
    return norms + _attention_kept(shape, p, width, masked) + mlp + adapter


_LINEARS = 7  # of a layer: queries, keys, values, output, gate, up, down


def _attention_kept(shape: Shape, p: int, width: int, masked: bool) -> float:
    """Queries, keys, values, what comes out; sdpa keeps the mask in the type of the products, eager the weights."""
    repeated = shape.queries if masked or shape.attention == "eager" else shape.keys  # sdpa with a mask repeats keys
    kept = p * (2 * shape.queries + 2 * repeated)
    if shape.attention == "eager":
        capped = p if shape.family == "gemma2" else 0  # tanh of the scores
        return kept + shape.heads * width * (4 + capped + (2 if p == 2 else 0))
    return kept + 4 * shape.heads + (p * width if masked and shape.attention == "sdpa" else 0)


def passing_per_token(shape: Shape, regime: Regime, width: int, masked: bool) -> float:
    """The most that one layer holds at once without gradient, bytes a token: in its MLP, or in its attention."""
    h, p, a = shape.hidden, regime.product, shape.queries
    # what is added to, what is read, the layer's input and the embeddings, which callers hold; rotary positions
    around = 4 * regime.stream * h + (p * h if regime.copied else 0) + 2 * regime.stream * shape.head_dim
    mlp = around + (3 if shape.gated else 2) * p * shape.intermediate
    scores = 3 * 4 * shape.heads * width if shape.attention == "eager" else p * width if masked else 0
    attention = around + regime.stream * (2 * a + shape.keys) + p * 2 * a + scores
    return max(mlp, attention)


def backward_per_token(shape: Shape, regime: Regime, width: int) -> float:
    """What the first layer of a backward holds beyond what was kept, bytes a token: gradients around the MLP's product,
    or of attention weights where they are whole."""
    mlp = regime.product * 2 * shape.intermediate + 2 * regime.stream * shape.hidden
    eager = 2 * 4 * shape.heads * width if shape.attention == "eager" else 0
    return max(mlp, eager)


def masks(shape: Shape, forward: Forward) -> float:
    """Masks that all layers share, bytes: boolean, or float32 where eager attention adds them; one a kind of layer."""
    if not forward.masked or shape.attention == "flash":
        return 0.0
    return forward.pairs * (2 if shape.sandwiched else 1) * (4 if shape.attention == "eager" else 1)


def mask_building(forward: Forward) -> float:
    """While a row's tree mask is made, bytes: distances as int64, and a few comparisons."""
    return 12.0 * forward.pairs if forward.masked and forward.shared else 0.0


def head_bytes(shape: Shape, forward: Forward, tile: int, *, reference: bool = False) -> float:
    """Statistics of the vocabulary, bytes: hidden states at the positions and their gradient, sums in float64, tiles.

    reference: its hidden states too, and tiles of its logits, for the exact KL.
    """
    if shape.scalar:
        return 0.0
    sums = 8 * (12 if reference else 6) * forward.positions
    states = (12 if reference else 8) * shape.hidden * forward.positions
    tile = min(tile, 4 * forward.positions * shape.vocab)
    return sums + states + (6 if reference else 4) * tile


def activations(shape: Shape, regime: Regime, forward: Forward, how: Activations, rank: int = 0) -> float:
    """The most that a microbatch holds between its forward and the end of its backward, bytes; without the head.

    keep: every layer's. recompute: every layer's input, and one layer whole. offload: those inputs lie in host memory.
    """
    layer = kept_per_token(shape, regime, forward.width, forward.masked, rank)
    last = 12 * shape.hidden  # the final norm
    backward = backward_per_token(shape, regime, forward.width)
    inputs = {"keep": 0, "recompute": shape.layers, "offload": 2}[how] * regime.stream * shape.hidden
    layers = shape.layers if how == "keep" else 1
    held = forward.tokens * (layers * layer + inputs + last + backward)
    return max(held + masks(shape, forward), mask_building(forward))


def copies(shape: Shape, regime: Regime, *, cached: bool, bits: Bits | None = None) -> float:
    """Weights in the type of the products, beside float32 ones, bytes. cached: all of them, as autocast keeps those
    that are trained; else the largest matrix. bits: quantized ones are made whole one by one, in float32 first."""
    if bits is not None:
        return float((4 + (regime.product if regime.product != 4 else 0)) * shape.largest)
    if not regime.copied:
        return 0.0
    return regime.product * float(shape.trunk + shape.head if cached else shape.largest)


def passing(shape: Shape, regime: Regime, forward: Forward, tile: int) -> float:
    """The most that a forward without gradient holds, bytes: one layer, masks, or the head."""
    layer = forward.tokens * passing_per_token(shape, regime, forward.width, forward.masked) + masks(shape, forward)
    head = head_bytes(shape, forward, tile) + regime.stream * shape.hidden * forward.tokens
    return max(layer, head, mask_building(forward))
