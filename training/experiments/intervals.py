"""Shares and means of a few runs, each with its interval: Wilson's and Student's; Fisher's test tells shares apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ANYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Share:
    """``count`` of ``runs``."""

    count: int
    runs: int

    @property
    def value(self) -> float:
        """The share itself, NaN without a run."""
        return self.count / self.runs if self.runs else math.nan

    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval."""
        found = stats.binomtest(self.count, self.runs).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        """Return e.g. ``8 of 12: 67 % [39, 86]``."""
        if not self.runs:
            return "no run"
        low, high = self.interval()
        return f"{self.count} of {self.runs}: {100 * self.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def fisher(one: Share, other: Share) -> float:
    """Return the two-sided p of Fisher's exact test that both come from the same share."""
    table = [[each.count, each.runs - each.count] for each in (one, other)]
    return float(stats.fisher_exact(table).pvalue)


@dataclass(frozen=True)
class Mean:
    """A mean over runs, its 95 % t interval and its standard ``error``, NaN where there are fewer than two runs.

    ``digits`` are shown behind the point.
    """

    value: float
    low: float
    high: float
    runs: int
    digits: int = 2
    error: float = math.nan

    def __str__(self) -> str:
        """Return e.g. ``48.2 [41.0, 55.4], n = 12``."""
        if not self.runs:
            return "no run"
        d = self.digits
        around = "" if math.isnan(self.low) else f" [{self.low:.{d}f}, {self.high:.{d}f}]"
        return f"{self.value:.{d}f}{around}, n = {self.runs}"


def mean(values: Sequence[float | None], digits: int = 2, *, within: tuple[float, float] = ANYWHERE) -> Mean:
    """Return the mean of the values that are there; the interval is cut where no value can lie (`within`)."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return Mean(math.nan, math.nan, math.nan, 0, digits)
    if len(known) == 1:
        return Mean(float(known[0]), math.nan, math.nan, 1, digits)
    error = float(known.std(ddof=1) / math.sqrt(len(known)))
    half, middle = float(stats.t.ppf(0.975, len(known) - 1)) * error, float(known.mean())
    return Mean(middle, max(middle - half, within[0]), min(middle + half, within[1]), len(known), digits, error)


def apart(one: Share | Mean, other: Share | Mean) -> bool:
    """Return whether two shares (Fisher) or two means (Welch) can be told apart, two-sided p < .05."""
    if isinstance(one, Share) and isinstance(other, Share):
        return fisher(one, other) < 0.05
    if isinstance(one, Mean) and isinstance(other, Mean):
        if math.isnan(one.error) or math.isnan(other.error):
            return False
        if one.error == other.error == 0:
            return one.value != other.value
        spread = [each.error * math.sqrt(each.runs) for each in (one, other)]
        found = stats.ttest_ind_from_stats(
            one.value, spread[0], one.runs, other.value, spread[1], other.runs, equal_var=False
        )
        return bool(found.pvalue < 0.05)
    raise TypeError("a share and a mean cannot be compared")
