"""The figures of the HTML report, as inline SVG drawn by matplotlib."""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rksp_core.profile import LayerProfile, ModelProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THRESHOLDS = ((1.05, "#b2182b"), (0.90, "#2166ac"), (0.80, "#92c5de"))  # of the masses: Kim et al. 2026, Def. 1
MASSES = (
    ("contractive_mass", "contractive, |λ| < 0.80", "#92c5de"),
    ("mid_mass", "mid", "#d9d9d9"),
    ("near_unit_mass", "near-unit, 0.90 to 1.05", "#1b7837"),
    ("expansive_mass", "expansive, |λ| > 1.05", "#d6604d"),
)


def eigenvalue_figure(profile: ModelProfile) -> str:
    """Return the eigenvalues in the complex plane, a panel for each third of the depth (Kim et al. 2026, Fig. 1).

    The axes show the unit circle and 99 % of the eigenvalues; those outside are counted in the panel's title.
    """
    thirds = [part for part in np.array_split(np.arange(len(profile.layers)), 3) if part.size]
    values = [np.asarray(layer.eigenvalues or (), dtype=np.complex128) for layer in profile.layers]
    box = _box(np.concatenate(values))
    height = 3.3 * 2 * box[2] / (box[1] - box[0]) + 0.8
    with new_figure(3.6 * len(thirds) + 1.0, min(height, 8.0)) as figure:
        axes = figure.subplots(1, len(thirds), sharey=True, squeeze=False)[0]
        for axis, part, title in zip(axes, thirds, ("early", "middle", "late"), strict=False):
            points = _scatter(axis, [values[i] for i in part], part)
            points.set_clim(0, max(len(values) - 1, 1))
            outside = sum(_outside(values[i], box) for i in part)
            note = f", {outside} outside" if outside else ""
            axis.set_title(f"{title}: blocks {part[0]} to {part[-1]}{note}" if len(thirds) > 1 else "all blocks")
            _circles(axis, box)
        axes[0].set_ylabel("Im λ")
        figure.colorbar(points, ax=list(axes), label="block", pad=0.01, fraction=0.025)
        return inline_svg(figure, "Eigenvalues of each block's operator in the complex plane")


def masses_figure(layers: tuple[LayerProfile, ...]) -> str:
    """Return the four spectral masses of each block as stacked bars."""
    with new_figure(11.8, 3.2) as figure:
        axis = figure.subplots()
        x, bottom = np.arange(len(layers)), np.zeros(len(layers))
        for name, label, colour in MASSES:
            heights = np.array([getattr(layer, name) or 0.0 for layer in layers])
            axis.bar(x, heights, bottom=bottom, color=colour, label=label, width=0.85)
            bottom += heights
        axis.set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, 1), xlabel="block", ylabel="share of modes")
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, frameon=False)
        return inline_svg(figure, "Spectral masses of each block")


def kreiss_figure(layers: tuple[LayerProfile, ...]) -> str:
    """Return Kreiss constant, transient growth, largest singular value and spectral radius of each block."""
    from matplotlib.ticker import LogFormatter

    lines = (
        ("kreiss_constant", "Kreiss constant K", "#1b7837", "o-"),
        ("transient_growth", "transient growth", "#7fbf7b", "^--"),
        ("sigma_max", "largest singular value", "#762a83", "s-"),
        ("spectral_radius", "spectral radius", "#b2182b", "d-"),
    )
    with new_figure(11.8, 3.2) as figure:
        axis = figure.subplots()
        for name, label, colour, style in lines:
            heights = [np.nan if (value := getattr(layer, name)) is None else value for layer in layers]
            axis.plot(heights, style, color=colour, label=label, markersize=4, linewidth=1.3)
        axis.axhline(1.0, color="#888888", linewidth=0.8)
        axis.set(xlim=(-0.6, len(layers) - 0.4), xlabel="block", yscale="log")
        axis.locator_params(axis="x", integer=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, frameon=False)
        return inline_svg(figure, "Kreiss constant, transient growth, largest singular value and radius of each block")


def _scatter(axis: Axes, values: list[Any], blocks: Any) -> Any:
    """Draw the points as an embedded picture: as vectors, a model of 12 layers would take megabytes."""
    numbers = np.repeat(blocks, [len(value) for value in values])
    points = np.concatenate(values)
    return axis.scatter(
        points.real, points.imag, c=numbers, s=3, cmap=_depth_colours(), alpha=0.7, linewidths=0, rasterized=True
    )


def _box(points: Any) -> tuple[float, float, float]:
    """Return left, right and top of the axes: the unit circle and all but the outermost eigenvalues."""
    if not points.size:
        return -1.2, 1.2, 1.2
    left, right = np.quantile(points.real, (0.005, 0.995))
    top = np.quantile(np.abs(points.imag), 0.99)
    return min(-1.2, 1.1 * float(left)), max(1.2, 1.1 * float(right)), max(1.2, 1.1 * float(top))


def _outside(points: Any, box: tuple[float, float, float]) -> int:
    left, right, top = box
    return int(((points.real < left) | (points.real > right) | (np.abs(points.imag) > top)).sum())


def _circles(axis: Axes, box: tuple[float, float, float]) -> None:
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 361))
    axis.plot(turn.real, turn.imag, color="#222222", linewidth=1.0, label="unit circle")
    for radius, colour in THRESHOLDS:
        ring = radius * turn
        axis.plot(ring.real, ring.imag, color=colour, linewidth=0.9, linestyle="--", label=f"|λ| = {radius:g}")
    left, right, top = box
    axis.set(xlim=(left, right), ylim=(-top, top), aspect="equal", xlabel="Re λ")


def _depth_colours() -> Any:
    """Return viridis without its yellow end, which is hard to see on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of its own: no pyplot, so no global state and no display."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "rksp",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
    }
    with mpl.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained", dpi=150)


def inline_svg(figure: Figure, description: str) -> str:
    """Return the drawing without XML prologue, scaled to the page, with a description for those who do not see it.

    Ids get a prefix made of the description: matplotlib numbers them anew in each drawing, and they share one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    prefix = f"f{zlib.crc32(description.encode()):08x}-"
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", drawing[drawing.index("<svg") :])
    return drawing.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
