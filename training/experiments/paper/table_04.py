"""Table 4: other stabilizers than KSS, in the setting of Table 3.

Lion has a tenth of the rates, as its authors advise; the paper does not say which it had.
"""

from __future__ import annotations

from training.experiments.paper import stabilizers
from training.experiments.paper.section import Section
from training.experiments.paper.stabilizers import Published

TITLE = "other stabilizers, in the setting of Table 3"
CHEAP = True
SPECS = (stabilizers.SPEC,)

PUBLISHED = {
    "none": Published(66.7, 28.5, 0.85),
    "spectral norm": Published(41.7, 35.2, None, "5.2"),
    "weight norm": Published(54.2, 32.8, None, "3.8"),
    "gradient penalty 0.1": Published(45.8, 33.1, None, "6.4"),
    "SAM 0.05": Published(37.5, 38.6, None, "100"),
    "SAM 0.10": Published(33.3, 40.2, None, "100"),
    "Lion": Published(45.8, 36.5, None, "15"),
    "KSS 0.15": Published(12.5, 48.2, 0.58, "10.8"),
    "KSS 0.15 + SAM 0.05": Published(8.3, 45.8, None, "112"),
}


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_04",
        title=TITLE,
        setting=stabilizers.setting(),
        header=stabilizers.HEADER,
        rows=stabilizers.rows(PUBLISHED),
        sentence=stabilizers.told_apart(PUBLISHED),
    )
