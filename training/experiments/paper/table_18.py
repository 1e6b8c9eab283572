"""Table 18: Kolmogorov-Arnold networks, and how many of their modes pass the ResDMD filter.

The paper does not say how many basis functions its KAN with KSS has; here they are 8.
"""

from __future__ import annotations

from training.experiments.paper import architectures
from training.experiments.paper.architectures import Published, over_seeds
from training.experiments.paper.section import Section

TITLE = "Kolmogorov-Arnold networks"
CHEAP = True
SPECS = ("kan_lm",)

REFERENCE = "B = 4"
PUBLISHED = {
    "B = 4": Published(0.52, 2.15, 0.68, 3),
    "B = 8": Published(0.48, 2.35, 0.52, 4),
    "B = 8 + KSS": Published(0.42, 1.92, 0.78, 1),
}
RATIO = {"B = 4": 0.78, "B = 8": 0.82, "B = 8 + KSS": 0.75}


def section() -> Section:
    """Return the table; the nonlinearity ratio has columns of its own."""
    rows = architectures.rows(SPECS[0], PUBLISHED, "reliable_modes_ratio", REFERENCE)
    ratios = {name: str(over_seeds(name, "nonlinearity_ratio")) for name in PUBLISHED if name in architectures.MODELS}
    return Section(
        name="table_18",
        title=TITLE,
        setting=architectures.setting(SPECS[0]),
        header=(
            *architectures.header("share of modes that pass the filter", REFERENCE),
            "eta_nl, the paper",
            "eta_nl, ours, untrained",
        ),
        rows=tuple((*row, str(RATIO[row[0]]), ratios.get(row[0], "as without KSS")) for row in rows),
        sentence=architectures.told_apart(SPECS[0], PUBLISHED, REFERENCE),
    )
