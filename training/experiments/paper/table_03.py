"""Table 3: KSS and clipping in No-Norm models at high rates.

Width 64 and 4 blocks in the place of the paper's larger models, on associative recall that is learned. "half the rate"
is no arm of the paper: it is what one does without any spectrum.
"""

from __future__ import annotations

from training.experiments.paper import stabilizers
from training.experiments.paper.section import Section
from training.experiments.paper.stabilizers import Published

TITLE = "KSS and clipping at high learning rates without normalization"
CHEAP = True
SPECS = (stabilizers.SPEC,)

PUBLISHED = {
    "none": Published(66.7, 28.5, 0.85),
    "clip 0.5": Published(50.0, 32.1, 0.82, "< 1"),
    "clip 1.0": Published(58.3, 30.8, 0.83, "< 1"),
    "KSS 0.10": Published(25.0, 42.3, 0.68, "9.5"),
    "KSS 0.15": Published(12.5, 48.2, 0.58, "10.8"),
    "KSS 0.20": Published(8.3, 46.5, 0.52, "11.2"),
    "half the rate": None,
}


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_03",
        title=TITLE,
        setting=stabilizers.setting(),
        header=stabilizers.HEADER,
        rows=stabilizers.rows(PUBLISHED),
        sentence=stabilizers.told_apart(PUBLISHED),
    )
