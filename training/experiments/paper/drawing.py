"""How the figures look: one style, colours that colour-blind readers tell apart, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.experiments.paper.contents import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, without the yellow, which is too light for a line on white.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
GREY = "0.6"


def canvas(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure, in inches, with one row of axes; ``options`` are those of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for each in axes:
        each.spines[:].set_color(GREY)
        if "top" in each.spines:
            each.spines[["top", "right"]].set_visible(False)
        each.tick_params(which="both", color=GREY, labelsize=8)
        each.title.set_fontsize(9)
        each.xaxis.label.set_fontsize(9)
        each.yaxis.label.set_fontsize(9)
    return figure, axes


def legend(axes: Axes, **options: Any) -> None:
    """Draw a legend without a frame."""
    axes.legend(frameon=False, fontsize=8, **options)


def save(figure: Figure, name: str) -> str:
    """Write ``docs/images/paper_NAME.png`` and return its path from the repository's root."""
    path = f"docs/images/paper_{name}.png"
    figure.savefig(ROOT / path, dpi=150, metadata={"Software": None})
    return path
