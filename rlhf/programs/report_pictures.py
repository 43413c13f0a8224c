"""Curves as SVG that can lie in a page: no scripts, no fonts, no colours of their own.

Nothing a user or a model wrote goes into a picture; names stand in the page around it. Colours are the page's CSS
variables, so that one picture suits a light and a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#000001", "#000002"
SERIES = tuple(f"#0000{10 + index:02x}" for index in range(6))  # stand-ins for --series-0 … --series-5
_VARIABLES = {INK: "--muted", GRID: "--grid", **{color: f"--series-{i}" for i, color in enumerate(SERIES)}}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "rlhf",  # the same numbers give the same bytes
    "text.parse_math": False,
    "font.size": 11,
}
_SIZE_INCHES = (4.7, 2.9)
_MOST_POINTS = 400
_RUBBISH = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.S)
_SIZE = re.compile(r' (?:width|height)="[\d.]+pt"')
_FONT = re.compile(r"font-family: [^;]*; ")
_OWN_IDS = re.compile(r' id="(?:figure|patch|axes|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection)_\d+"')


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, y) of one run. dots: shown as points (few, measured on held-out prompts) instead of a
    smoothed line. series: which of the page's colours."""

    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    dots: bool = False


def curves(key: str, drawn: Sequence[Curve]) -> Markup:
    """y over step. key: a word of ours that keeps ids apart within a page."""
    figure, axes = _canvas()
    joined = 0.0 if any(not curve.dots for curve in drawn) else 1.2
    for curve in drawn:
        color = SERIES[curve.series % len(SERIES)]
        if curve.dots or len(curve.x) < 2:
            axes.plot(curve.x, curve.y, color=color, lw=joined, marker="o", ms=6, mew=0)
            continue
        x, y = _thinned(curve.x, curve.y)
        smooth = _smoothed(y)
        if smooth is not y:
            axes.plot(x, y, color=color, lw=0.8, alpha=0.28)
        axes.plot(x, smooth, color=color, lw=2.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("step")
    return _svg(figure, key)


def frontier(key: str, drawn: Sequence[Curve]) -> Markup:
    """y over KL in nats, on a √KL axis (Gao et al., 2023: reward is close to a parabola in √KL). Later is stronger."""
    figure, axes = _canvas()
    for curve in drawn:
        color = SERIES[curve.series % len(SERIES)]
        x, y = (np.maximum(curve.x, 0.0), np.asarray(curve.y)) if curve.dots else _averaged(curve.x, curve.y)
        strength = np.linspace(0.25, 1.0, len(x))
        axes.plot(x, y, color=color, lw=0.9, alpha=0.5)
        axes.scatter(x, y, s=26, color=[to_rgba(color, a) for a in strength], linewidths=0)
        axes.scatter(x[-1:], y[-1:], s=70, color=color, linewidths=0)
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0.0)), np.square))
    right = max((float(np.max(curve.x)) for curve in drawn), default=1.0)
    axes.set_xlim(0.0, max(right, 1e-6) * 1.06)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("KL to the reference, nats (√ scale)")
    return _svg(figure, key)


def _canvas() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0, pad=5)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.02, y=0.12)
    return figure, axes


def _svg(figure: Figure, key: str) -> Markup:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = _OWN_IDS.sub("", _RUBBISH.sub("", buffer.getvalue()))
    text = _FONT.sub("", _SIZE.sub("", text, count=2))  # the page gives font and width, the viewBox the shape
    text = re.sub(r' id="', f' id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = text.replace("url(#", f"url(#{key}-")
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return Markup(text.strip())  # made of numbers and our own words only


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most _MOST_POINTS means of neighbours: a page of a 100,000-step run stays small."""
    blocks = np.array_split(np.arange(len(x)), min(len(x), _MOST_POINTS))
    across, up = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return np.array([across[b].mean() for b in blocks]), np.array([up[b].mean() for b in blocks])


def _averaged(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of runs of steps: one rollout's KL and score are too noisy to draw a path with."""
    blocks = np.array_split(np.arange(len(x)), min(max(len(x) // 5, 6), 24, len(x)))
    across, up = np.maximum(np.asarray(x, dtype=float), 0.0), np.asarray(y, dtype=float)
    return np.array([across[b].mean() for b in blocks]), np.array([up[b].mean() for b in blocks])


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the run, narrower at the ends; short curves stay as they are."""
    half = len(y) // 30
    if half < 1:
        return y
    total = np.concatenate([[0.0], np.cumsum(y)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    smooth: np.ndarray = (total[high] - total[low]) / (high - low)
    return smooth
