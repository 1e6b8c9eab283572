"""What became of every event of a run, read from its ledger beside the watcher that writes it, or from an export.

    for row in read_history(Path("runs/7")).rows():
        print(row.step, row.level)

Reading never disturbs a watcher, needs no watcher to be there, and holds one row in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rksp_core.errors import ConfigError
from rksp_core.orders import is_whole, seconds, timestamp
from rksp_monitor.packed import unpack
from rksp_monitor.remote import as_path

SCHEMA = "rksp.history/1"

# Figures of a profile that are shown: name -> field of its summary, aggregate over the layers.
FIGURES = {
    "near_unit_mass_mean": ("near_unit_mass", "mean"),
    "near_unit_mass_min": ("near_unit_mass", "min"),
    "expansive_mass_mean": ("expansive_mass", "mean"),
    "spectral_radius_max": ("spectral_radius", "max"),
    "sigma_max": ("sigma_max", "max"),
    "henrici_departure_max": ("henrici_departure", "max"),
    "kreiss_constant_mean": ("kreiss_constant", "mean"),
    "kreiss_constant_max": ("kreiss_constant", "max"),
}
BESIDE = ("loss", "gradient_norm")  # as the trainer wrote them into its own profile


@dataclass(frozen=True)
class Row:
    """One event, or a person's hold (``kind`` "hold"): its begin, change or end, and each order that followed from it.

    Times are in seconds since the epoch, ``judged`` None for what was not judged.

    ``profile``, ``evidence`` and ``decision`` are the JSON forms of `rksp_core.profile.ModelProfile` (without
    eigenvalues), `rksp_core.policy.Evidence` and `Decision`; None for what was not judged, or by a watcher of a time
    when they were not kept. ``set_aside`` marks what a trainer did after a step that it went back to.
    """

    kind: str
    step: int
    status: str
    attempts: int = 0
    error: str = ""
    path: str = ""
    seen: float | None = None
    judged: float | None = None
    set_aside: bool = False
    profile: Mapping[str, Any] | None = None
    evidence: Mapping[str, Any] | None = None
    decision: Mapping[str, Any] | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of the profile, by the names of `FIGURES` and `BESIDE`; None where unknown."""
        profile = self.profile or {}
        summary = profile.get("summary", {})
        figures = {name: summary.get(source, {}).get(over) for name, (source, over) in FIGURES.items()}
        return figures | {name: profile.get(name) for name in BESIDE}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; times as ISO 8601 texts."""
        return {
            "kind": self.kind,
            "step": self.step,
            "status": self.status,
            "attempts": self.attempts,
            "error": self.error,
            "path": self.path,
            "seen": None if self.seen is None else timestamp(self.seen),
            "judged": None if self.judged is None else timestamp(self.judged),
            "set_aside": self.set_aside,
            "profile": self.profile,
            "evidence": self.evidence,
            "decision": self.decision,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Row:
        """Read the JSON form; what a later version adds is ignored.

        Raises
        ------
        KeyError, TypeError, ValueError
            When something is missing or of another type.
        """
        if not is_whole(document["step"]):
            raise ValueError(f"step must be a whole number, got {document['step']!r}")
        for name in ("profile", "evidence", "decision"):
            if not isinstance(document.get(name), Mapping | None):
                raise ValueError(f"{name} must be a mapping or null, got {document[name]!r:.40}")
        times = {name: None if document.get(name) is None else seconds(document[name]) for name in ("seen", "judged")}
        return cls(
            kind=str(document["kind"]),
            step=document["step"],
            status=str(document["status"]),
            attempts=document.get("attempts", 0),
            error=str(document.get("error", "")),
            path=str(document.get("path", "")),
            **times,
            set_aside=bool(document.get("set_aside", False)),
            profile=document.get("profile"),
            evidence=document.get("evidence"),
            decision=document.get("decision"),
        )


@dataclass(frozen=True)
class Selection:
    """Which rows are wanted; None and empty are all. What was set aside is left out unless asked for."""

    kind: str | None = None
    statuses: tuple[str, ...] = ()
    from_step: int | None = None
    to_step: int | None = None
    set_aside: bool = False

    def admits(self, row: Row) -> bool:
        """Whether the row is one of them."""
        return (
            (self.kind is None or row.kind == self.kind)
            and (not self.statuses or row.status in self.statuses)
            and (self.from_step is None or row.step >= self.from_step)
            and (self.to_step is None or row.step <= self.to_step)
            and (self.set_aside or not row.set_aside)
        )


EVERYTHING = Selection(set_aside=True)


@dataclass(frozen=True)
class History:
    """The events of one run and the holds of its people, in the order they were judged.

    ``complete`` is False for an export that left rows out: what the policy decided cannot be decided again from it.
    """

    run: str
    source: Path
    complete: bool
    _read: Callable[[Selection], Iterator[Row]] = field(repr=False)
    _judged: Callable[[], Iterator[Row]] = field(repr=False)  # rows with evidence, maybe without their documents

    def rows(self, selection: Selection = EVERYTHING) -> Iterator[Row]:
        """Yield the rows that are wanted, one at a time.

        Raises
        ------
        ConfigError
            When the ledger can no longer be read.
        """
        return self._read(selection)

    def covers(self, selection: Selection) -> bool:
        """Whether the wanted rows hold all that was judged, and the policy's decisions can be made again from them."""
        return self.complete and all(map(selection.admits, self._judged()))


def read_history(source: Path | str, *, run: str | None = None) -> History:
    """Return the history in a ledger file, an export (``rksp history --format json``), or a run folder.

    Parameters
    ----------
    source
        A run folder is looked at as `rksp watch` with no further settings does; a caller that has settings names the
        ledger (`rksp_monitor.run.describe_run`).
    run
        Name of the run, where a ledger holds several or the folder had several.

    Raises
    ------
    ConfigError
        When there is none, or it cannot be read.
    """
    path = as_path(source)
    if path.suffix == ".json":
        return _of_export(path)
    if path.suffix == ".sqlite3":
        return _of_ledger(path, run)
    from rksp_monitor.config import RunSettings
    from rksp_monitor.run import describe_run

    return _of_ledger(describe_run(path, RunSettings(run_id=run)).ledger, run)


# -- the ledger


def _of_ledger(path: Path, run: str | None) -> History:
    if not path.is_file():
        raise no_ledger(path)
    with _opened(path) as database:
        runs = [name for (name,) in database.execute("SELECT DISTINCT run FROM events ORDER BY run")]
    if run is None and len(runs) > 1:
        raise ConfigError(f"{path} holds the runs {', '.join(runs)}; name one with --run-id")
    if run is not None and runs and run not in runs:
        raise ConfigError(f"{path} holds the run {', '.join(runs)}, not {run}; name that one with --run-id")
    name = run or (runs[0] if runs else path.stem)
    return History(name, path, True, lambda selection: _ledger_rows(path, name, selection), lambda: _judged(path, name))


def no_ledger(path: Path) -> ConfigError:
    """Return what to say where a ledger is missing."""
    return ConfigError(f"there is no ledger {path}{_others(path)}")


def _others(path: Path) -> str:
    """Return what else lies where a ledger is missing, and what to do."""
    try:
        others = sorted(other.stem for other in path.parent.glob("*.sqlite3"))
    except OSError:
        others = []
    if others:
        return f"; there are those of {', '.join(others[:5])}: name the run with --run-id"
    return "; watch the run first, or say where its watcher keeps it with --state-dir, or its --config"


_COLUMNS = tuple(f.name for f in dataclasses.fields(Row))

# Columns that a ledger of the first version has not.
_LATER = {"judged": "NULL", "ordinal": "0", "evidence": "NULL", "decision": "NULL", "set_aside": "0"}


def _ledger_rows(path: Path, run: str, selection: Selection) -> Iterator[Row]:
    """Yield rows; each is fetched by its own id, so nothing is sorted but numbers, and no writer waits for us."""
    with _opened(path) as database:
        has = {column[1] for column in database.execute("PRAGMA table_info(events)")}
        later = {name: name if name in has else absent for name, absent in _LATER.items()}
        # Judged before that column was there: nothing changed the row since.
        judged = f"coalesce({later['judged']}, CASE WHEN status = 'done' THEN updated END)"
        sources = {"seen": "first_seen", **later, "judged": judged}
        columns = ", ".join(sources.get(name, name) for name in _COLUMNS)
        found = database.execute(
            f"SELECT id, kind, step, status, {later['set_aside']}, coalesce({judged}, updated) AS at, "  # noqa: S608
            f"{later['ordinal']} AS ordinal, 0 AS decree FROM events WHERE run = ?1 UNION ALL {_decrees(database)} "
            "ORDER BY at, ordinal, decree, id",
            (run,),
        )
        wanted = [row[:2] for row in found if selection.admits(Row(row[1], row[2], row[3], set_aside=bool(row[4])))]
        for number, kind in wanted:
            if kind == "hold":
                kept = "SELECT step, judged, decision FROM decrees WHERE id = ?"
                step, when, decision = database.execute(kept, (number,)).fetchone()
                yield Row(kind, step, "done", judged=when, decision=unpack(decision))
                continue
            values = database.execute(f"SELECT {columns} FROM events WHERE id = ?", (number,)).fetchone()  # noqa: S608
            if values is not None:  # else it was written anew since, and has another row
                yield _row(*values)


def _judged(path: Path, run: str) -> Iterator[Row]:
    with _opened(path) as database:
        has = {column[1] for column in database.execute("PRAGMA table_info(events)")}
        aside, evidence = (name if name in has else _LATER[name] for name in ("set_aside", "evidence"))
        columns = f"SELECT kind, step, status, {aside} FROM events WHERE run = ? AND {evidence} IS NOT NULL"  # noqa: S608
        for kind, step, status, set_aside in database.execute(columns, (run,)):
            yield Row(kind, step, status, set_aside=bool(set_aside))


def _decrees(database: sqlite3.Connection) -> str:
    """Return what selects the decisions that no event led to; an earlier version kept none."""
    kept = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'decrees'").fetchone()
    source = "decrees" if kept else "(SELECT 0 AS id, '' AS run, 0 AS step, 0 AS judged, 0 AS ordinal)"
    return f"SELECT id, 'hold', step, 'done', 0, judged, ordinal, 1 FROM {source} WHERE run = ?1"  # noqa: S608


def _row(*values: Any) -> Row:
    named = dict(zip(_COLUMNS, values, strict=True))
    documents = {name: None if named[name] is None else unpack(named[name]) for name in _COLUMNS[9:]}
    return Row(**named | {"set_aside": bool(named["set_aside"])} | documents)


def read_states(ledger: Path, run: str) -> dict[str, dict[str, Any]]:
    """Return what a watcher keeps between events, by name ("policy", "order"); nothing when there is no ledger yet.

    Raises
    ------
    ConfigError
        When the ledger cannot be read.
    """
    if not ledger.is_file():
        return {}
    with _opened(ledger) as database:
        rows = database.execute("SELECT name, document FROM state WHERE run = ?", (run,))
        return {name: json.loads(document) for name, document in rows}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger for reading alone; where nobody writes it, not even a lock is left beside it."""
    # A ledger that is open, or was when its watcher was killed, has a write-ahead log. Without one there is nothing
    # to share, and SQLite need not make the files that it shares a log with.
    logged = path.with_name(f"{path.name}-wal").exists()
    place = f"{path.absolute().as_uri()}?mode=ro" + ("" if logged else "&immutable=1")
    try:
        database = sqlite3.connect(place, uri=True, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA query_only = 1")
            yield database
        finally:
            database.close()
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read as a ledger ({error}); copy it and what lies beside it") from error


# -- an export


def _of_export(path: Path) -> History:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise ConfigError(f"{path} cannot be read ({reason}); write it with `rksp history --format json`") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"a history has schema {SCHEMA!r}, {path} has {schema!r}; write it with `rksp history`")
    try:
        rows = [Row.from_dict(row) for row in document["rows"]]
        run, complete = str(document["run"]), bool(document.get("complete", False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"the history {path} is damaged ({error!r}); write it again with `rksp history`") from error
    judged = [row for row in rows if row.evidence is not None]
    return History(run, path, complete, lambda selection: filter(selection.admits, rows), lambda: iter(judged))
