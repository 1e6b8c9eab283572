"""Figure 6: the architectures of Table 11 as a radar chart.

The paper does not say which five metrics it has nor how they are normalized: here each runs from 0 in the centre to the
largest of the five architectures at the rim.
"""

from __future__ import annotations

import numpy as np

from training.experiments.paper.architectures import SEEDS, STATES, over_seeds
from training.experiments.paper.drawing import COLOURS, GREY, canvas, save
from training.experiments.paper.section import Section, said, same
from training.experiments.paper.table_11 import PUBLISHED

TITLE = "the architectures of Table 11 as a radar chart"
CHEAP = True
SPECS = ()

METRICS = {
    "near_unit_mass": "near-unit mass",
    "expansive_mass": "expansive mass",
    "contractive_mass": "contractive mass",
    "spectral_radius": "spectral radius",
    "nonlinearity_ratio": "nonlinearity ratio",
}

# What the paper says about the picture: (architecture, metric, largest or smallest of the five).
SAID = (
    ("Mamba, narrow", "contractive_mass", True),
    ("Mamba, narrow", "near_unit_mass", False),
    ("No-Norm", "near_unit_mass", True),
    ("B = 8", "nonlinearity_ratio", True),
)


def section() -> Section:
    """Draw the figure."""
    values = {name: [over_seeds(name, metric).value for metric in METRICS] for name in PUBLISHED}
    found = [_extreme(values, metric, largest) for _, metric, largest in SAID]
    return Section(
        name="figure_6",
        title=TITLE,
        setting=f"As Table 11: untrained, width 256, 6 blocks, N = {STATES}, means over layers and {len(SEEDS)} seeds.",
        rows=tuple(
            (
                f"{'largest' if largest else 'smallest'} {METRICS[metric]}",
                PUBLISHED[name][0],
                PUBLISHED[ours][0],
                same(ours == name),
            )
            for (name, metric, largest), ours in zip(SAID, found, strict=True)
        ),
        sentence=said(
            "Of what the paper reads from its chart only the near-unit mass of No-Norm is seen in ours: untrained, "
            "Mamba has the second largest near-unit mass, Pre-LN has the largest contractive mass, and a mixture of "
            "experts the largest nonlinearity ratio.",
            found == ["Pre-LN", "Pre-LN", "No-Norm", "8 experts, top-2"],
            sorted(values, key=lambda name: values[name][0])[-2] == "Mamba, narrow",
        ),
        figure=_draw(values),
    )


def _extreme(values: dict[str, list[float]], metric: str, largest: bool) -> str:
    place = list(METRICS).index(metric)
    return (max if largest else min)(values, key=lambda name: values[name][place])


def _draw(values: dict[str, list[float]]) -> str:
    figure, (axes,) = canvas(5.6, 5, subplot_kw={"polar": True})
    angles = np.linspace(0, 2 * np.pi, len(METRICS), endpoint=False)
    rim = np.max(list(values.values()), axis=0)
    for (name, own), colour, style in zip(values.items(), COLOURS, ("-", "--", "-.", "-", "--"), strict=False):
        shown = np.append(own / rim, own[0] / rim[0])
        axes.plot(np.append(angles, angles[0]), shown, style, color=colour, linewidth=1.5, label=PUBLISHED[name][0])
    axes.set_xticks(angles, ["" for _ in METRICS])
    for angle, label, most in zip(angles, METRICS.values(), rim, strict=True):
        side = "center" if abs(np.sin(angle)) < 0.1 else "right" if np.sin(angle) > 0 else "left"
        axes.text(angle, 1.1, f"{label}\n(rim {most:.2f})", ha=side, va="center", fontsize=8)
    axes.set_yticks([0.25, 0.5, 0.75], [])
    axes.set_ylim(0, 1)
    axes.set_theta_zero_location("N")
    axes.grid(color="0.85")
    axes.spines["polar"].set_color(GREY)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save(figure, "figure_6")
