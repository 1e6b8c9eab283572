"""Table 17: Mamba, and a Pre-LN transformer on the same language."""

from __future__ import annotations

from training.experiments.paper import architectures
from training.experiments.paper.architectures import Published
from training.experiments.paper.section import Section

TITLE = "Mamba"
CHEAP = True
SPECS = ("mamba_lm",)

REFERENCE = "Pre-LN on the language"
PUBLISHED = {
    "Mamba, narrow": Published(0.12, 0.95, 0.85, 0, 48.2),
    "Mamba, twice as wide": Published(0.15, 0.97, 0.82, 0, 52.6),
    "Pre-LN on the language": Published(0.42, 1.85, 0.38, 1, 45.8),
}


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_17",
        title=TITLE,
        setting=architectures.setting(SPECS[0]),
        header=architectures.header("contractive mass", REFERENCE),
        rows=architectures.rows(SPECS[0], PUBLISHED, "contractive_mass", REFERENCE),
        sentence=architectures.told_apart(SPECS[0], PUBLISHED, REFERENCE),
    )
