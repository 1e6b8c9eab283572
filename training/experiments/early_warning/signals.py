"""Which figures move before a divergence: AUROC of every signal, and what of it is only that the run is hot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.experiments.early_warning.series import FORMS, SIGNALS, Form, Series
from training.experiments.ranking import LEVEL, RESAMPLES, Estimate

RATE_FACTOR = 2.0  # rates within it count as similar
STEP_WINDOW = 10  # steps that count as the same
# Shown whatever they tell: what the paper and the prototype relied on.
ALWAYS = {
    f"{name}, {form}"
    for name in ("near_unit_mass_mean", "near_unit_mass_min", "log_kreiss_max", "log_kreiss_mean")
    for form in ("absolute", "trailing")
}


@dataclass(frozen=True)
class Events:
    """Events of several runs beside each other: those of one run stand together."""

    run: np.ndarray  # index of the run, (E,)
    step: np.ndarray
    runs: Sequence[Series]

    def of(self, form: Form, signal: int) -> np.ndarray:
        """Return one signal of all events."""
        chosen = [np.isin(each.steps, self.step[self.run == place]) for place, each in enumerate(self.runs)]
        parts = [each.forms[form][keep, signal] for each, keep in zip(self.runs, chosen, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0)


class Pairs:
    """Pairs (an event shortly before an onset, an event of a healthy run) that a signal has to order.

    Early events of diverged runs are left out: they are neither near an onset nor of a healthy run. A bootstrap draws
    runs, not events, and needs only how many pairs of two runs are in order: `auroc` of a drawing is a quotient of two
    quadratic forms of how often each run was drawn.
    """

    def __init__(self, runs: Sequence[Series], within: int) -> None:
        warned = [each for each in runs if each.kind == "diverged"]
        calm = [each for each in runs if each.kind == "healthy"]
        self._bad, self._good = _events(warned, within), _events(calm, None)
        self.runs = (len(warned), len(calm))
        count = len(warned) + len(calm)
        drawn = (
            np.random.default_rng(0).integers(0, count, (RESAMPLES, count)) if count else np.zeros((RESAMPLES, 0), int)
        )
        times = np.stack([np.bincount(each, minlength=count) for each in (np.arange(count), *drawn)]).astype(float)
        self._times = times[:, : len(warned)], times[:, len(warned) :]  # the first row is everything once

    def matched(self, by: Callable[[Series, Series], bool] | None, steps: float = math.inf) -> np.ndarray:
        """Return which pairs (bad, good) count: runs that agree, at steps at most ``steps`` apart."""
        bad, good = self._bad, self._good
        if by is None:
            agree = np.ones((len(bad.runs), len(good.runs)), dtype=bool)
        else:
            agree = np.array([[by(one, other) for other in good.runs] for one in bad.runs], dtype=bool).reshape(
                len(bad.runs), len(good.runs)
            )
        return agree[np.ix_(bad.run, good.run)] & (np.abs(bad.step[:, None] - good.step[None, :]) <= steps)

    def auroc(self, form: Form, signal: int, counted: Sequence[np.ndarray]) -> list[Estimate]:
        """Return the AUROC of a signal among the pairs that count, once for each of several ways to count."""
        bad, good = self._bad.of(form, signal), self._good.of(form, signal)
        known = np.isfinite(bad)[:, None] & np.isfinite(good)[None, :]
        with np.errstate(invalid="ignore"):
            order = (bad[:, None] > good[None, :]) + 0.5 * (bad[:, None] == good[None, :])
        return [self._estimate(np.where(known & pairs, order, 0.0), known & pairs) for pairs in counted]

    def _estimate(self, order: np.ndarray, pairs: np.ndarray) -> Estimate:
        bad, good = self._times
        right, all_pairs = (((bad @ self._by_run(matrix)) * good).sum(axis=1) for matrix in (order, pairs))
        with np.errstate(invalid="ignore"):
            values = right / all_pairs
        known = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (math.nan, math.nan)
        return Estimate(float(values[0]), float(low), float(high), sum(self.runs))

    def _by_run(self, matrix: np.ndarray) -> np.ndarray:
        one, other = (
            np.eye(count)[events.run] for count, events in zip(self.runs, (self._bad, self._good), strict=True)
        )
        return np.asarray(one.T @ matrix.astype(float) @ other)


def alike(one: Series, other: Series) -> bool:
    """Return whether two runs have the same norm and optimizer, and rates within `RATE_FACTOR`."""
    same = (one.norm, one.optimizer) == (other.norm, other.optimizer)
    return same and abs(math.log(one.rate / other.rate)) <= math.log(RATE_FACTOR) + 1e-9


COLUMNS: dict[str, tuple[Callable[[Series, Series], bool] | None, float]] = {
    "all": (None, math.inf),
    "same step": (None, STEP_WINDOW),
    "no_norm, same step": (lambda one, other: one.norm == other.norm == "no_norm", STEP_WINDOW),
    "normalized, same step": (lambda one, other: "no_norm" not in (one.norm, other.norm), STEP_WINDOW),
    "matched": (alike, STEP_WINDOW),
}


def table(runs: Sequence[Series], within: int, shown: int) -> str:
    """Return, as Markdown, the signals that tell most among pairs at the same step; below .5 a signal falls."""
    pairs = Pairs(runs, within)
    counted = [pairs.matched(*how) for how in COLUMNS.values()]
    rows = []
    for form in FORMS:
        for place, name in enumerate(SIGNALS):
            found = pairs.auroc(form, place, counted)
            rows.append((f"{name}, {form}", found))
    rows = [row for row in rows if math.isfinite(row[1][1].value)]
    rows.sort(key=lambda row: -abs(row[1][1].value - 0.5))
    always = [row for row in rows[shown:] if row[0] in ALWAYS]
    heads = [f"{name} ({int(each.sum())} pairs)" for name, each in zip(COLUMNS, counted, strict=True)]
    lines = [f"| signal | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(str, found))} |" for name, found in (*rows[:shown], *always)]
    return "\n".join(lines)


def _events(runs: Sequence[Series], within: int | None) -> Events:
    """Return the events at most ``within`` steps before an onset, or those of runs without one; not the first event."""
    index, step = [], []
    for place, each in enumerate(runs):
        keep = each.steps > 0
        if within is not None and each.onset is not None:
            keep &= (each.steps < each.onset) & (each.steps >= each.onset - within)
        index += [place] * int(keep.sum())
        step += each.steps[keep].tolist()
    return Events(np.array(index, dtype=int), np.array(step, dtype=int), runs)
