"""Which rules to have: chosen greedily at a price of false alarms, and judged on runs that they were not chosen on.

A rule of one free threshold is known by its `peaks`: the largest value it sees in a run while an alarm still counts. It
gives an alarm where the peak exceeds its threshold. A conjunction has one free threshold as well: each figure is
measured in units of how it spreads among healthy runs, and the smallest of them counts.

One set of rules is to serve all `INTERVALS`. So a healthy run counts as a false alarm when it gives one at any of
them, and what is caught is added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rksp_core.features import SPECTRAL, WEIGHTS
from training.experiments.early_warning.rules import Clause, Direction, Rule
from training.experiments.early_warning.series import DISTANCES, FORMS, PLACES, Form, Series

INTERVALS = (10, 20, 50, 100)
LEAD = 2  # checkpoints before the onset
ARMED = (20, 60, 100)
LEAST_GAIN = 2  # catches, over all intervals and less the price, that one more rule must add
RULES = 3  # at most
ALARMED = 0.15  # of the healthy runs, at most, for one more rule
FOLDS = 10
PRICES = (4.0, 1.0, 0.5, 0.25)  # of a false alarm, in divergences caught

# What a watcher can see, from what it has today to what needs most.
SOURCES: dict[str, tuple[str, ...]] = {
    "spectra": (*SPECTRAL, *DISTANCES),
    "trainer": ("loss", "log_gradient_norm"),
    "every step of the trainer": (
        "loss_worst",
        "log_gradient_norm_median",
        "log_gradient_norm_worst",
        "gradient_norm_spike",
    ),
    "weights": WEIGHTS,
    "optimizer": ("log_update_ratio_max", "log_update_ratio_median", "second_moment_top_share", "momentum_cosine"),
    "model": (
        "log_attention_logit_max",
        "log_logit_max",
        "log_logit_rms",
        "log_hidden_rms_last",
        "log_hidden_rms_ratio",
        "attention_entropy_min",
        "attention_entropy_mean",
        "probe_loss",
    ),
    "sharpness": ("log_sharpness",),
}

SETS: dict[str, tuple[str, ...]] = {
    "spectra": ("spectra",),
    "loss and gradient norm": ("trainer",),
    "weights": ("weights",),
    "spectra, loss, gradient norm, weights": ("spectra", "trainer", "weights"),
    "all these, every step, the optimizer's state": (
        "spectra",
        "trainer",
        "weights",
        "every step of the trainer",
        "optimizer",
    ),
    "all these, the model's inside, sharpness": tuple(SOURCES),
}
# Scales and losses are bad when they rise; these are when they fall.
FALLING = ("near_unit_mass_mean", "near_unit_mass_min", "attention_entropy_min", "attention_entropy_mean")
EITHER = ("expansive_mass_mean", "contractive_mass_mean", "momentum_cosine", "second_moment_top_share")
# Their level is the task's or the model's own, so only their moves may give an alarm.
OWN_LEVEL = (
    "loss",
    "loss_worst",
    "log_gradient_norm",
    "log_gradient_norm_median",
    "log_gradient_norm_worst",
    "log_weight_norm_max",
    "log_weight_norm_head",
    "log_logit_max",
    "log_logit_rms",
    "log_hidden_rms_last",
    "probe_loss",
)
# Of which any two may form a conjunction, all against the trailing average.
TOGETHER = (
    "near_unit_mass_min",
    "log_henrici_max",
    "log_kreiss_mean",
    "log_sigma_max",
    "loss",
    "log_gradient_norm_worst",
    "log_weight_norm_max",
    "log_weight_norm_head",
    "log_update_ratio_median",
    "log_attention_logit_max",
)
Key = tuple[str, Form, Direction]


@dataclass(frozen=True)
class Candidate:
    """A rule without its threshold; ``scales`` are what a figure of a conjunction is divided by."""

    keys: tuple[Key, ...]
    arm_after_step: int
    in_a_row: int = 1
    scales: tuple[float, ...] = (1.0,)

    def rule(self, threshold: float) -> Rule:
        """Return the rule of a threshold."""
        clauses = []
        for (metric, form, direction), scale in zip(self.keys, self.scales, strict=True):
            by = threshold * scale
            signed = -by if form == "absolute" and direction == "falls" else by
            clauses.append(Clause(metric, form, direction, float(f"{signed:.4g}")))
        return Rule(tuple(clauses), self.arm_after_step, self.in_a_row)

    def metrics(self) -> set[str]:
        """Return the figures it needs."""
        return {metric for metric, _, _ in self.keys}


@dataclass(frozen=True)
class Cases:
    """The same runs at several intervals.

    Attributes
    ----------
    runs
        By interval, in the same order; those that failed without diverging are not among them.
    healthy, diverged
        (R,)
    """

    runs: Mapping[int, Sequence[Series]]
    healthy: np.ndarray = field(init=False)
    diverged: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        kinds = [run.kind for run in next(iter(self.runs.values()))]
        object.__setattr__(self, "healthy", np.array([kind == "healthy" for kind in kinds]))
        object.__setattr__(self, "diverged", np.array([kind == "diverged" for kind in kinds]))


def candidates(cases: Cases) -> list[Candidate]:
    """Return all rules to choose from."""
    keys: list[Key] = [
        (metric, form, direction)
        for metric in itertools.chain(*SOURCES.values())
        for form in FORMS
        for direction in _directions(metric)
        if (form != "absolute" or metric not in OWN_LEVEL)
        # no sample is drawn for the weights, so sigmas of them would count the smoothness of the run
        and (form != "sigmas" or metric not in WEIGHTS)
    ]
    found = [Candidate((key,), armed, row) for key in keys for armed in ARMED for row in (1, 2)]
    moves: list[Key] = [(metric, "trailing", _directions(metric)[0]) for metric in TOGETHER]
    scales = {key: _scale(cases, key) for key in moves}
    found += [
        Candidate(pair, armed, 1, (scales[pair[0]], scales[pair[1]]))
        for pair in itertools.combinations(moves, 2)
        for armed in ARMED
    ]
    return found


def peaks(offered: Sequence[Candidate], runs: Sequence[Series], lead: int) -> np.ndarray:
    """Return (C, R): the largest value while an alarm counts, -inf where there is none.

    An alarm counts from where the rule is armed, and of a diverged run up to ``lead`` steps before the onset.
    """
    keys = list(dict.fromkeys(key for each in offered for key in each.keys))
    places = {key: place for place, key in enumerate(keys)}
    found = np.full((len(offered), len(runs)), -np.inf)
    for column, run in enumerate(runs):
        counts = run.steps > 0
        if run.onset is not None:
            counts &= run.steps <= run.onset - lead
        if not counts.any():
            continue
        values = np.stack([_signed(run, key) for key in keys])  # (K, E)
        armed = {start: counts & (run.steps >= start) for start in {each.arm_after_step for each in offered}}
        for row, each in enumerate(offered):
            if not armed[each.arm_after_step].any():
                continue
            seen = values[places[each.keys[0]]]
            if len(each.keys) > 1:
                parts = zip(each.keys, each.scales, strict=True)
                seen = np.min([values[places[key]] / scale for key, scale in parts], axis=0)
            for _ in range(each.in_a_row - 1):
                # both events must be armed, so what came before the arming counts for nothing
                seen = np.minimum(
                    seen, np.concatenate([[-np.inf], np.where(armed[each.arm_after_step], seen, -np.inf)[:-1]])
                )
            found[row, column] = seen[armed[each.arm_after_step]].max()
    return found


@dataclass(frozen=True)
class Table:
    """The peaks of all candidates.

    Attributes
    ----------
    caught
        (I, C, R), at each interval.
    false
        (C, R), of healthy runs, the largest over the intervals.
    spread
        (C,), of the peaks of healthy runs; 1 where they do not differ.
    """

    offered: Sequence[Candidate]
    cases: Cases
    caught: np.ndarray
    false: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, cases: Cases, offered: Sequence[Candidate]) -> Table:
        """Measure all candidates."""
        caught = np.stack([peaks(offered, runs, LEAD * interval) for interval, runs in cases.runs.items()])
        return cls.from_peaks(cases, offered, caught)

    @classmethod
    def from_peaks(cls, cases: Cases, offered: Sequence[Candidate], caught: np.ndarray) -> Table:
        """Return the table of peaks (I, C, R) that were measured."""
        false = np.where(cases.healthy, caught, -np.inf).max(axis=0)
        known = [row[np.isfinite(row)] for row in false]
        spread = np.array([float(np.std(row)) if len(row) and np.std(row) > 0 else 1.0 for row in known])
        return cls(offered, cases, caught, false, spread)

    def seen_by(self, metrics: set[str]) -> np.ndarray:
        """Return the places of the candidates that need no other figures."""
        return np.array([place for place, each in enumerate(self.offered) if each.metrics() <= metrics], dtype=int)


def choose(
    table: Table, among: np.ndarray, price: float, within: np.ndarray, most: int = RULES
) -> list[tuple[int, float]]:
    """Return (candidate, threshold) of at most so many rules, chosen on the runs ``within`` (R,).

    Each rule in turn is the one that adds most: the divergences caught that were not yet, less the ``price`` of each
    healthy run that it is the first to alarm; and the one with the widest gap among equals. Its threshold lies in the
    middle between the healthy runs that it spares and the divergences that it catches.
    """
    healthy, diverged = within & table.cases.healthy, within & table.cases.diverged
    alarmed = np.zeros(len(within), dtype=bool)
    caught = np.zeros(table.caught[:, 0].shape, dtype=bool)
    chosen: list[tuple[int, float]] = []
    while len(chosen) < most and len(among):
        spared = np.sort(np.where(healthy & ~alarmed, table.false[among], -np.inf), axis=1)[:, ::-1]
        best = None
        for more in range(int(ALARMED * healthy.sum()) + 1):
            if more >= (healthy & ~alarmed).sum():
                break
            bound = spared[:, more]
            new = (table.caught[:, among] > bound[:, None]) & (diverged & ~caught)[:, None]  # (I, A, R)
            gain = new.sum(axis=(0, 2)) / len(table.caught)  # a run that is caught at all intervals counts as one
            least = np.where(new, table.caught[:, among], np.inf).min(axis=(0, 2))
            gap = np.where((gain > 0) & np.isfinite(bound), least - bound, 0.0)
            margin = gap / table.spread[among]
            worth = gain - price * more
            top = np.lexsort((margin, worth))[-1]
            if best is None or worth[top] > best[0]:
                threshold = (least[top] + bound[top]) / 2 if np.isfinite(bound[top]) else least[top] - 1e-6
                best = (worth[top], int(among[top]), float(threshold))
        if best is None or best[0] * len(table.caught) < LEAST_GAIN:
            break
        _, place, threshold = best
        chosen.append((place, threshold))
        false = table.false[place] > threshold
        alarmed |= false
        caught |= table.caught[:, place] > threshold
    return chosen


@dataclass(frozen=True)
class Verdict:
    """Which runs the rules caught in time (I, R) and which healthy ones they alarmed (I, R)."""

    caught: np.ndarray
    false: np.ndarray


def left_out(table: Table, among: np.ndarray, price: float, most: int = RULES) -> Verdict:
    """Return the verdict on each run by the rules that were chosen without it, and without a tenth of the others.

    The configurations of a sweep have one seed each, so leaving out a run leaves out its configuration. Only the units
    of the conjunctions, how far each figure spreads, are of all healthy runs.
    """
    count = len(table.cases.healthy)
    folds = np.random.default_rng(0).permutation(count) % FOLDS
    fired = np.zeros((len(table.caught), count), dtype=bool)
    for fold in range(FOLDS):
        for place, threshold in choose(table, among, price, folds != fold, most):
            fired |= (folds == fold) & (table.caught[:, place] > threshold)
    return Verdict(fired & table.cases.diverged, fired & table.cases.healthy)


def _directions(metric: str) -> tuple[Direction, ...]:
    return ("falls",) if metric in FALLING else ("falls", "rises") if metric in EITHER else ("rises",)


def _signed(run: Series, key: Key) -> np.ndarray:
    """Return the values, larger is worse; -inf where they are unknown, and where there is no move in this direction."""
    metric, form, direction = key
    values = run.forms[form][:, PLACES[metric]] * (1.0 if direction == "rises" else -1.0)
    counts = np.isfinite(values) & ((values > 0) | (form == "absolute"))
    return np.where(counts, values, -np.inf)


def _scale(cases: Cases, key: Key) -> float:
    """Return how a figure spreads among the events of the healthy runs at the first interval."""
    metric, form, _ = key
    runs = next(iter(cases.runs.values()))
    values = np.concatenate([run.forms[form][:, PLACES[metric]] for run in runs if run.kind == "healthy"])
    values = values[np.isfinite(values)]
    return float(f"{np.std(values):.3g}") if len(values) and np.std(values) > 0 else 1.0
