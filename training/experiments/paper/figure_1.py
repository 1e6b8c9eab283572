"""Figure 1: the eigenvalues of each layer of a Pre-LN transformer in the complex plane."""

from __future__ import annotations

import numpy as np

from rksp_core.spectrum import LOWER, UPPER
from training.experiments.intervals import mean
from training.experiments.paper.architectures import SEEDS, STATES, over_seeds, untrained
from training.experiments.paper.drawing import GREY, canvas, save
from training.experiments.paper.section import Section, said, same

TITLE = "eigenvalues of the layers of a Pre-LN transformer"
CHEAP = True
SPECS = ()

MODEL = "Pre-LN"
WINDOW = 2.6  # the plane is shown to here; what lies beyond is counted


def section() -> Section:
    """Draw the figure; the paper prints no figures of it."""
    radii = np.array([profile.values("spectral_radius") for profile in untrained(MODEL)], dtype=float)  # (seeds, L)
    masses = np.array([profile.values("near_unit_mass") for profile in untrained(MODEL)], dtype=float)
    first, last = radii[:, 0], radii[:, -1]
    return Section(
        name="figure_1",
        title=TITLE,
        setting=(
            f"Untrained, width 256, 6 blocks, associative recall, N = {STATES}; means over {len(SEEDS)} seeds, the "
            "picture of the first. The paper does not say whether its model was trained."
        ),
        rows=(
            (
                "spectral radius, first and last layer",
                "rises with depth",
                f"{mean(list(first))}; {mean(list(last))}",
                same(bool(last.mean() > first.mean())),
            ),
            (
                "near-unit mass, first and last layer",
                "early layers cluster near the unit circle",
                f"{mean(list(masses[:, 0]))}; {mean(list(masses[:, -1]))}",
                same(bool(masses[:, 0].mean() > masses[:, -1].mean())),
            ),
            ("spectral radius, mean over layers", "2.29 (Table 1)", str(over_seeds(MODEL, "spectral_radius")), "-"),
        ),
        sentence=said(
            "Untrained, it is the other way round: the first layer is the most expansive, as its update is ten times "
            "as large as the embeddings, and the deeper a layer, the more of its eigenvalues lie near the unit "
            "circle, all of them around 1 and not around the circle.",
            bool((first > 2 * last).all()),
            bool((np.diff(radii.mean(axis=0)) < 0).all()),
            all((profile.values("update_ratio")[0] or 0) > 8 for profile in untrained(MODEL)),
            bool((np.diff(masses.mean(axis=0)) > 0).all()),
        ),
        figure=_draw(),
    )


def _draw() -> str:
    layers = untrained(MODEL)[0].layers
    figure, (axes,) = canvas(5.2, 4.2)
    angles = np.linspace(0, 2 * np.pi, 400)
    ring = np.concatenate([UPPER * np.exp(1j * angles), LOWER * np.exp(-1j * angles)])
    axes.fill(ring.real, ring.imag, color="0.85", zorder=0, linewidth=0)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
    beyond = 0
    for place, layer in enumerate(layers):
        values = np.array(layer.eigenvalues)
        beyond += int((np.maximum(abs(values.real), abs(values.imag)) > WINDOW).sum())
        axes.plot(values.real, values.imag, ".", markersize=3, color=colours(place), alpha=0.8, markeredgewidth=0)
    norm = BoundaryNorm(np.arange(len(layers) + 1) + 0.5, colours.N)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, ticks=range(1, len(layers) + 1), shrink=0.8)
    bar.set_label("layer", fontsize=9)
    bar.ax.tick_params(labelsize=8, color=GREY)
    bar.outline.set_visible(False)
    bar.minorticks_off()
    axes.set(
        xlim=(-WINDOW, WINDOW), ylim=(-WINDOW, WINDOW), aspect="equal", xlabel="real part", ylabel="imaginary part"
    )
    every = sum(layer.rank for layer in layers)
    axes.set_title(f"grey: near-unit, {LOWER} to {UPPER}; {beyond} of {every} eigenvalues lie outside the frame")
    axes.title.set_fontsize(9)
    return save(figure, "figure_1")
