"""The runs that tables read: made by the sweep, kept without what no table needs, grouped into arms."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import defaultdict
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.experiments import sweep
from training.experiments.intervals import Mean, Share, mean
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


def diverged(records: list[Record]) -> Share:
    """Return how many runs diverged, by the label ``rksp``."""
    return Share(sum(record["labels"]["rksp"] is not None for record in records), len(records))


def accuracy(records: list[Record]) -> Mean:
    """Return the mean held-out accuracy in percent; of a diverged run, that of its last finite state."""
    found = [record["final"]["accuracy"] for record in records]
    return mean([None if value is None else 100 * value for value in found], 1, within=(0, 100))


def near_unit_mass(records: list[Record]) -> Mean:
    """Return the mean near-unit mass of the last profile, of the runs that got to one after the start."""
    later = [record for record in records if record["profiles"]["step"][-1] > 0]
    return mean([last(record, "near_unit_mass_mean") for record in later], within=(0, 1))


def last(record: Record, feature: str) -> float | None:
    """Return a feature of the last profile of a run."""
    values: list[Any] = record["profiles"]["features"].get(feature, [])
    return compact(values[-1]) if values else None
