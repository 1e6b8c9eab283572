"""Table 6: what of KSS it is that helps, and whether a plain penalty would, in the setting of Table 3.

The paper's correlation of -.87 is between the change of near-unit mass and the reduction of the diverged share, over
its arms; ours is over the arms of this table, with the masses of the runs that reached a profile.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from training.experiments.paper import stabilizers
from training.experiments.paper.runs import diverged, near_unit_mass
from training.experiments.paper.section import Section, same
from training.experiments.paper.stabilizers import Published

TITLE = "the terms of KSS, and other penalties"
CHEAP = True
SPECS = (stabilizers.SPEC,)

PUBLISHED = {
    "none": Published(66.7, 28.5, 0.85),
    "L2 on residuals": Published(54.2, 31.2, 0.81),
    "Jacobian penalty": Published(45.8, 33.8, 0.78),
    "activation variance": Published(50.0, 32.5, 0.80),
    "unstable term only": Published(33.3, 38.5, 0.68),
    "near-unit term only": Published(41.7, 36.2, 0.72),
    "KSS 0.15": Published(12.5, 48.2, 0.58),
}
CORRELATION = -0.87  # the paper's


def section() -> Section:
    """Return the table, and a row for the correlation."""
    ours, low, high, count = _correlation()
    told = "-" if math.isnan(ours) else f"{ours:.2f} [{low:.2f}, {high:.2f}], n = {count} arms"
    agree = None if math.isnan(ours) else (ours < 0) == (CORRELATION < 0)
    name = "correlation of the change of near-unit mass and the reduction of the diverged share"
    row = (name, str(CORRELATION), told, same(agree), *["-"] * 6)
    return Section(
        name="table_06",
        title=TITLE,
        setting=stabilizers.setting(),
        header=stabilizers.HEADER,
        rows=(*stabilizers.rows(PUBLISHED), row),
        sentence=stabilizers.told_apart(PUBLISHED),
    )


def _correlation() -> tuple[float, float, float, int]:
    """Return r of mass and minus the diverged share over the arms, with its Fisher interval; NaN where nothing varies.

    What doing nothing has is taken off by the paper, which changes no correlation.
    """
    runs = stabilizers.found()
    points = []
    for name in [each for each in PUBLISHED if each != stabilizers.NONE]:
        mass = near_unit_mass(runs.get(name, []))
        if mass.runs:
            points.append((mass.value, -diverged(runs[name]).value))
    if len(points) < 4 or min(np.ptp(points, axis=0)) == 0:
        return math.nan, math.nan, math.nan, len(points)
    found = stats.pearsonr(*np.transpose(points))
    interval = found.confidence_interval(0.95)
    return float(found.statistic), float(interval.low), float(interval.high), len(points)
