"""Table 16: mixtures of experts."""

from __future__ import annotations

from training.experiments.paper import architectures
from training.experiments.paper.architectures import Published
from training.experiments.paper.section import Section

TITLE = "mixtures of experts"
CHEAP = True
SPECS = ("moe_lm",)

REFERENCE = "8 experts, top-1"
PUBLISHED = {
    "8 experts, top-1": Published(0.72, 2.85, 0.68, 6, 32.4),
    "8 experts, top-2": Published(0.58, 2.12, 0.55, 2, 41.7),
    "8 experts, top-4": Published(0.45, 1.78, 0.48, 1, 38.2),
    "16 experts, top-2": Published(0.65, 2.45, 0.61, 4, 38.9),
    "16 experts, top-2 + KSS": Published(0.48, 1.92, 0.58, 1, 44.5),
}


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_16",
        title=TITLE,
        setting=architectures.setting(SPECS[0]),
        header=architectures.header("eta_nl", REFERENCE),
        rows=architectures.rows(SPECS[0], PUBLISHED, "nonlinearity_ratio", REFERENCE),
        sentence=architectures.told_apart(SPECS[0], PUBLISHED, REFERENCE),
    )
