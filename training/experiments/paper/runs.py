"""The runs that tables read: made by the sweep, kept without what no table needs, grouped into arms."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.experiments import sweep
from training.experiments.paper.contents import ROOT, records_of, spec_of
from training.experiments.plan import plan
from training.experiments.record import PACKED, Record, compact, read_records
from training.experiments.spec import read_spec

# Of the profiles along a run; a record of the sweep holds distances and indicators as well.
FEATURES = (
    "near_unit_mass_mean",
    "expansive_mass_mean",
    "contractive_mass_mean",
    "spectral_radius_max",
    "log_kreiss_max",
)
EVERY = 10  # of the losses and gradient norms, which a table only plots or averages


def make_runs(spec: str, jobs: int, time_limit: float | None) -> int:
    """Make the runs of a sweep that have no record yet, and keep all of them; return the sweep's exit code."""
    folder, kept = ROOT / "runs" / "sweeps" / "paper" / spec, records_of(spec)
    if kept.exists() and not (folder / PACKED).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, folder / PACKED)  # so that a sweep goes on elsewhere
    limit = [] if time_limit is None else ["--time-limit", str(time_limit)]
    code = sweep.main([str(spec_of(spec)), "--folder", str(folder), "--jobs", str(jobs), *limit])
    if (folder / PACKED).exists():
        keep(spec, list(read_records(folder / PACKED)))
    return code


def keep(spec: str, records: list[Record]) -> None:
    """Write the records of a sweep to where tables read them, each `stripped`; the same records give the same bytes."""
    if records:
        lines = sorted(json.dumps(stripped(record), allow_nan=False, separators=(",", ":")) for record in records)
        records_of(spec).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(records_of(spec), gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def stripped(record: Record) -> Record:
    """Return a record with the losses and gradient norms of steps 1, 11, 21, .. and a few features only.

    ``steps.every`` says so; a record that was stripped stays as it is.
    """
    if "every" in record["steps"]:
        return record
    steps, profiles = record["steps"], record["profiles"]
    return {
        **record,
        "look_ahead": [],
        "steps": {"every": EVERY, **{name: values[::EVERY] for name, values in steps.items()}},
        "profiles": {
            "step": profiles["step"],
            "features": {name: profiles["features"][name] for name in FEATURES if name in profiles["features"]},
        },
    }


def arms(spec: str) -> dict[str, list[Record]]:
    """Return the records of a sweep by group, in the order of the spec; a group without a record is left out.

    Raises
    ------
    ConfigError
        When no run is kept.
    """
    if not records_of(spec).exists():
        raise ConfigError(f"no run of {spec_of(spec)} is kept; make them: add --run")
    found: dict[str, list[Record]] = defaultdict(list)
    for record in read_records(records_of(spec)):
        found[record["group"]].append(record)
    return {group.name: found[group.name] for group in read_spec(spec_of(spec)).groups if found[group.name]}


def progress(spec: str) -> str:
    """Return how many of the planned runs are made, such as "144 runs" or "90 of 144 runs so far"."""
    made, planned = sum(map(len, arms(spec).values())), len(plan(read_spec(spec_of(spec))))
    return f"{planned} runs" if made == planned else f"{made} of {planned} runs so far"


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


def diverged(records: list[Record]) -> Share:
    """Return how many runs diverged, by the label ``rksp``."""
    return Share(sum(record["labels"]["rksp"] is not None for record in records), len(records))


def fisher(one: Share, other: Share) -> float:
    """Return the two-sided p of Fisher's exact test that both come from the same share."""
    table = [[each.count, each.runs - each.count] for each in (one, other)]
    return float(stats.fisher_exact(table).pvalue)


@dataclass(frozen=True)
class Mean:
    """A mean over runs and its 95 % t interval, NaN where there are fewer than two; ``digits`` behind the point."""

    value: float
    low: float
    high: float
    runs: int
    digits: int = 2

    def __str__(self) -> str:
        """Return e.g. ``48.2 [41.0, 55.4], n = 12``."""
        if not self.runs:
            return "no run"
        d = self.digits
        around = "" if math.isnan(self.low) else f" [{self.low:.{d}f}, {self.high:.{d}f}]"
        return f"{self.value:.{d}f}{around}, n = {self.runs}"


def mean(values: list[float | None], digits: int = 2, *, within: tuple[float, float] = (-math.inf, math.inf)) -> Mean:
    """Return the mean of the values that are there; the interval is cut where no value can lie (`within`)."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return Mean(math.nan, math.nan, math.nan, 0, digits)
    if len(known) == 1:
        return Mean(float(known[0]), math.nan, math.nan, 1, digits)
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    middle = float(known.mean())
    return Mean(middle, max(middle - half, within[0]), min(middle + half, within[1]), len(known), digits)


def accuracy(records: list[Record]) -> Mean:
    """Return the mean held-out accuracy in percent; of a diverged run, that of its last finite state."""
    found = [record["final"]["accuracy"] for record in records]
    return mean([None if value is None else 100 * value for value in found], 1, within=(0, 100))


def last(record: Record, feature: str) -> float | None:
    """Return a feature of the last profile of a run."""
    values: list[Any] = record["profiles"]["features"].get(feature, [])
    return compact(values[-1]) if values else None
