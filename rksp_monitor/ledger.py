"""What became of every checkpoint and profile of a run, in SQLite, so that a restart goes on where the last one ended.

    seen -> ready -> processing -> done
                 ^        |-----> ready again after a back-off, then failed
                 |        |-----> skipped, expired
                 `------- a row left in processing by a crash

Each event is processed at least once. Its outcome, the drift and policy state after it and the order it led to are
one transaction: an order is in the ledger before the trainer can see it, so a generation is never used twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rksp_core.errors import ConfigError
from rksp_monitor.checkpoints import Kind
from rksp_monitor.discovery import Sighting
from rksp_monitor.filesystem import filesystem_of, is_remote
from rksp_monitor.ownership import Owned, owned
from rksp_monitor.packed import pack, unpack
from rksp_monitor.remote import as_path

Status = Literal["seen", "ready", "processing", "done", "failed", "expired", "skipped"]
STATUSES: tuple[Status, ...] = ("seen", "ready", "processing", "done", "failed", "expired", "skipped")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL, fingerprint TEXT NOT NULL,
    path TEXT NOT NULL, format TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', profile TEXT,
    first_seen REAL NOT NULL, updated REAL NOT NULL,
    judged REAL, ordinal INTEGER, evidence TEXT, decision TEXT, set_aside INTEGER NOT NULL DEFAULT 0,
    UNIQUE (run, kind, step, fingerprint, path));
CREATE INDEX IF NOT EXISTS events_status ON events (run, status, step);
CREATE INDEX IF NOT EXISTS events_path ON events (run, path);
CREATE INDEX IF NOT EXISTS events_ordinal ON events (run, ordinal);
CREATE INDEX IF NOT EXISTS events_kept ON events (run, kind, status, set_aside, step);
CREATE TABLE IF NOT EXISTS decrees (id INTEGER PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL,
    judged REAL NOT NULL, ordinal INTEGER NOT NULL, decision TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS state (run TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (run, name));
"""
_VERSION = 2

# What brings a ledger of the version to the next one.
_MIGRATIONS = {
    1: (
        "ALTER TABLE events ADD COLUMN judged REAL",
        "ALTER TABLE events ADD COLUMN ordinal INTEGER",  # order of judging: a clock may step back
        "ALTER TABLE events ADD COLUMN evidence TEXT",
        "ALTER TABLE events ADD COLUMN decision TEXT",
        "ALTER TABLE events ADD COLUMN set_aside INTEGER NOT NULL DEFAULT 0",
    ),
}
_COLUMNS = "id, kind, step, fingerprint, path, format, status, attempts, error, first_seen"
CACHE_KIB = 256  # of pages, kept per ledger; SQLite's own 2 MiB would be 100 in a process of fifty runs
_PENDING = ""  # the fingerprint of something that is not complete: it changes with every write


@dataclass(frozen=True)
class Event:
    """One row: a checkpoint or profile of one step. ``attempts`` counts those that were started."""

    id: int
    kind: str
    step: int
    fingerprint: str
    path: Path
    format: str
    status: Status
    attempts: int
    error: str
    first_seen: float


@dataclass(frozen=True)
class Outcome:
    """What is kept of an event that was judged: its profile, and the evidence and decision that followed from it."""

    profile: Mapping[str, Any]
    evidence: Mapping[str, Any]
    decision: Mapping[str, Any]


class Ledger:
    """The state of one run. Open it with `open_ledger`, which holds the lock of its single writer."""

    def __init__(self, database: sqlite3.Connection, run: str, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._run = run
        self._clock = clock
        self._inode: int | None = None
        self._recorded: set[tuple[Path, str]] = set()  # complete ones: every scan sees them all again
        _migrate(database)

    def check_there(self, path: Path) -> None:
        """Check that the file in ``path`` is still the one that was opened: SQLite would write into a deleted one.

        Raises
        ------
        ConfigError
            When it was removed or replaced.
        """
        try:
            found = path.stat().st_ino
        except OSError:
            found = None
        self._inode = self._inode or found
        if found is None or found != self._inode:
            raise ConfigError(f"the ledger {path} was removed or replaced while it was in use")

    # -- events

    def record_all(self, sightings: Iterable[Sighting]) -> list[Sighting]:
        """Note what a scan saw, in one transaction; return what is new.

        The first scan of a run that was not watched sees all of it: a transaction each would be a hundred a second.
        """
        with self._transaction():
            return [sighting for sighting in sightings if self.record(sighting)]

    def record(self, sighting: Sighting) -> bool:
        """Note what a scan saw; return whether it is new: never seen, or complete for the first time."""
        if (sighting.path, sighting.fingerprint) in self._recorded:
            return False
        key = (self._run, sighting.kind, sighting.step, str(sighting.path))
        now = self._clock()
        with self._transaction():
            if not sighting.complete:
                return self._insert(sighting, _PENDING, "seen", sighting.problem, now)
            same = "run = ? AND kind = ? AND step = ? AND path = ?"
            self._database.execute(f"DELETE FROM events WHERE {same} AND fingerprint = ?", (*key, _PENDING))  # noqa: S608
            if self._moved(sighting):
                self._recorded.add((sighting.path, sighting.fingerprint))
                return False
            fresh = self._insert(sighting, sighting.fingerprint, "ready", "", now) or self._is_back(key, sighting, now)
            if fresh:
                self._database.execute(
                    f"UPDATE events SET status = 'expired', error = 'written again', updated = ? "  # noqa: S608
                    f"WHERE {same} AND fingerprint != ? AND status = 'ready'",
                    (now, *key, sighting.fingerprint),
                )
        self._recorded.add((sighting.path, sighting.fingerprint))
        return fresh

    def _moved(self, sighting: Sighting) -> bool:
        """Follow what is known to another path: the run folder was renamed, or is named otherwise than before."""
        known = (self._run, sighting.kind, sighting.step, sighting.fingerprint, str(sighting.path))
        statement = "UPDATE OR IGNORE events SET path = ? WHERE run = ? AND kind = ? AND step = ? AND fingerprint = ?"
        return self._database.execute(f"{statement} AND path != ?", (known[-1], *known)).rowcount > 0

    def _is_back(self, key: tuple[Any, ...], sighting: Sighting, now: float) -> bool:
        """Make what had vanished and is there again, unchanged, ready: the disk it lies on was away, say."""
        return (
            self._database.execute(
                "UPDATE events SET status = 'ready', attempts = 0, not_before = 0, error = '', updated = ? "
                "WHERE run = ? AND kind = ? AND step = ? AND path = ? AND fingerprint = ? AND status = 'expired'",
                (now, *key, sighting.fingerprint),
            ).rowcount
            == 1
        )

    def _insert(self, sighting: Sighting, fingerprint: str, status: Status, error: str, now: float) -> bool:
        inserted = self._database.execute(
            "INSERT OR IGNORE INTO events (run, kind, step, fingerprint, path, format, status, error, first_seen, "
            "updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._run,
                sighting.kind,
                sighting.step,
                fingerprint,
                str(sighting.path),
                sighting.format,
                status,
                error,
                now,
                now,
            ),
        )
        return inserted.rowcount == 1

    def known(self) -> list[Sighting]:
        """Return what was complete when it was seen last: a scanner need not open it again to know that."""
        rows = self._database.execute(
            "SELECT path, format, kind, step, fingerprint FROM events WHERE run = ? AND fingerprint != ? ORDER BY id",
            (self._run, _PENDING),
        )
        return [
            Sighting(as_path(path), format_name, kind, step, fingerprint, complete=True)
            for path, format_name, kind, step, fingerprint in rows
        ]

    def events(self, *statuses: Status) -> list[Event]:
        """Return the rows in these states (all when none is named), by step."""
        wanted = statuses or STATUSES
        marks = ", ".join("?" * len(wanted))
        rows = self._database.execute(
            f"SELECT {_COLUMNS} FROM events "  # noqa: S608
            f"WHERE run = ? AND status IN ({marks}) ORDER BY step, kind DESC, first_seen",
            (self._run, *wanted),
        )
        return [_event(row) for row in rows]

    def counts(self) -> dict[Status, int]:
        """Return the number of rows in each state."""
        rows = self._database.execute("SELECT status, COUNT(*) FROM events WHERE run = ? GROUP BY status", (self._run,))
        return dict.fromkeys(STATUSES, 0) | dict(rows)

    def backlog(self) -> int:
        """Return the number of events that wait: asked at every scan, it counts those alone."""
        row = self._database.execute(
            "SELECT COUNT(*) FROM events WHERE run = ? AND status = 'ready'", (self._run,)
        ).fetchone()
        return int(row[0])

    def next_ready(self, kind: Kind | None = None) -> Event | None:
        """Return the ready event (of a kind) of the lowest step whose back-off is over; a clock set back ends it."""
        now = self._clock()
        row = self._database.execute(
            f"SELECT {_COLUMNS} FROM events WHERE run = ? AND status = 'ready' "  # noqa: S608
            "AND (not_before <= ? OR updated > ?) AND kind = coalesce(?, kind) "
            "ORDER BY step, kind DESC, first_seen LIMIT 1",
            (self._run, now, now, kind),
        ).fetchone()
        return _event(row) if row else None

    def claim(self, event: Event) -> None:
        """Mark the event as being processed; the attempt is counted before it starts, should it kill us."""
        self._move(event, "processing", attempts=event.attempts + 1)

    def release(self, event: Event) -> None:
        """Give an abandoned event back, as if the attempt had not been made."""
        self._move(event, "ready", attempts=event.attempts)

    def near_judged(self, event: Event, steps: int) -> bool:
        """Whether another event of its kind was judged less than so many steps away, on either side.

        An earlier content of the same path does not count: the new one tells that the trainer went back.
        """
        row = self._database.execute(
            "SELECT 1 FROM events WHERE run = ? AND kind = ? AND status = 'done' AND set_aside = 0 "
            "AND step > ? AND step < ? AND path != ? LIMIT 1",
            (self._run, event.kind, event.step - steps, event.step + steps, str(event.path)),
        ).fetchone()
        return row is not None

    def later_ready(self, kind: str, step: int) -> bool:
        """Whether an event of this kind and a higher step waits."""
        row = self._database.execute(
            "SELECT 1 FROM events WHERE run = ? AND kind = ? AND status = 'ready' AND step > ? LIMIT 1",
            (self._run, kind, step),
        ).fetchone()
        return row is not None

    def judged_count(self, kind: str) -> int:
        """Return the number of events of a kind that were judged."""
        row = self._database.execute(
            "SELECT COUNT(*) FROM events WHERE run = ? AND kind = ? AND status = 'done' AND set_aside = 0",
            (self._run, kind),
        ).fetchone()
        return int(row[0])

    def went_back(self, event: Event, profile: Mapping[str, Any]) -> bool:
        """Whether an event below the last judged step shows that the trainer went back to an earlier checkpoint.

        It does when the same path was judged with another profile (a file that was only touched, copied back or moved
        to another disk has the same one); or when it is the third in a row, each of a higher step than the one before,
        that was seen only after that last step was judged. One or two may just be late.
        """
        same = "run = ? AND kind = ? AND status = 'done' AND id != ?"
        who = (self._run, event.kind, event.id)
        before = self._database.execute(
            f"SELECT profile FROM events INDEXED BY events_path WHERE {same} AND path = ? "  # noqa: S608
            "ORDER BY ordinal DESC LIMIT 1",
            (*who, str(event.path)),
        ).fetchone()
        if before is not None:
            # The noise is measured now and then. What is compared went through JSON, which writes a float exactly.
            old, new = (dict(each, noise=None) for each in (unpack(before[0]), profile))
            if "weight_norms" not in old:  # an older version judged it
                new.pop("weight_norms", None)
            return old != new
        highest = self._database.execute(
            f"SELECT step, judged FROM events WHERE {same} AND set_aside = 0 ORDER BY step DESC LIMIT 1",  # noqa: S608
            who,
        ).fetchone()
        last = self._database.execute(
            f"SELECT step, first_seen FROM events WHERE {same} AND set_aside = 0 "  # noqa: S608
            "ORDER BY ordinal DESC LIMIT 2",
            who,
        ).fetchall()
        if len(last) < 2 or highest[1] is None:
            return False
        (second, second_seen), (first, first_seen) = last
        rising = first < second < event.step < highest[0]
        return bool(rising and min(first_seen, second_seen, event.first_seen) > highest[1])

    def evidence_before(self, step: int) -> Iterator[dict[str, Any]]:
        """Yield the evidence of what was judged below the step and is not set aside, in that order."""
        rows = self._database.execute(
            "SELECT evidence FROM events INDEXED BY events_ordinal WHERE run = ? AND status = 'done' "
            "AND set_aside = 0 AND step < ? AND evidence IS NOT NULL ORDER BY ordinal",
            (self._run, step),
        )
        yield from (unpack(stored) for (stored,) in rows)

    def recover(self) -> int:
        """Make events that a crash left in processing ready again; return how many."""
        with self._transaction():
            return self._database.execute(
                "UPDATE events SET status = 'ready' WHERE run = ? AND status = 'processing'", (self._run,)
            ).rowcount

    def reopen_checkpoints(self, subject: str) -> int:
        """Make checkpoints that failed or were skipped with another subject ready again; return how many.

        ``subject`` names the model, probe and settings that they are replayed with now; it is remembered. What was
        never finished stays as it is: no subject completes it.
        """
        if (self.load("subject") or {}).get("is") == subject:
            return 0
        with self._transaction():
            self._store("subject", {"is": subject})
            return self._database.execute(
                "UPDATE events SET status = 'ready', attempts = 0, not_before = 0"
                " WHERE run = ? AND kind = 'checkpoint' AND status IN ('failed', 'skipped') AND fingerprint != ?",
                (self._run, _PENDING),
            ).rowcount

    def retry(self, event: Event, error: str, delay: float) -> None:
        """Make a failed attempt ready again after ``delay`` seconds."""
        self._move(event, "ready", error=error, not_before=self._clock() + delay)

    def close_event(self, event: Event, status: Status, error: str) -> None:
        """Mark the event as failed, expired or skipped, and why; what expired may come back."""
        if status == "expired":
            self._recorded.discard((event.path, event.fingerprint))
        self._move(event, status, error=error)

    def finish(
        self, event: Event, outcome: Outcome, states: Mapping[str, Mapping[str, Any]], *, undone: bool = False
    ) -> None:
        """Mark the event as done, with what was found and decided and the states after it, in one transaction.

        ``undone`` says that the trainer went back to before the event's step: what was judged at that step and later is
        set aside.
        """
        packed = {field.name: pack(getattr(outcome, field.name)) for field in dataclasses.fields(outcome)}
        with self._transaction():
            if undone:
                self.set_aside(event.step, {})
            judged, ordinal = self._now()
            self._move(event, "done", error="", judged=judged, ordinal=ordinal + 1, **packed)
            for name, document in states.items():
                self._store(name, document)

    def set_aside(self, step: int, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Set aside what was judged at this step and later, and store the states, in one transaction."""
        with self._transaction():
            self._database.execute(
                "UPDATE events SET set_aside = 1 WHERE run = ? AND status = 'done' AND step >= ? AND set_aside = 0",
                (self._run, step),
            )
            for name, document in states.items():
                self._store(name, document)

    def decree(self, step: int, decision: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep a decision that no event led to, and the states after it, in one transaction."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO decrees (run, step, judged, ordinal, decision) VALUES (?, ?, ?, ?, ?)",
                (self._run, step, *self._now(), pack(decision)),
            )
            for name, document in states.items():
                self._store(name, document)

    def _now(self) -> tuple[float, int]:
        """Return the time, never before that of the event judged last, though the clock may step back; and its ordinal.

        The last one by its index: a maximum over a column would read every row, with all that is kept in it.
        """
        last, ordinal = self._database.execute(
            "SELECT judged, ordinal FROM events WHERE run = ? AND ordinal > 0 ORDER BY ordinal DESC LIMIT 1",
            (self._run,),
        ).fetchone() or (0.0, 0)
        return max(self._clock(), last), ordinal

    def _move(self, event: Event, status: Status, **columns: Any) -> None:
        values = {"status": status, "updated": self._clock(), **columns}
        assignments = ", ".join(f"{name} = ?" for name in values)
        with self._transaction():
            self._database.execute(
                f"UPDATE events SET {assignments} WHERE id = ?",  # noqa: S608
                (*values.values(), event.id),
            )

    # -- state

    def load(self, name: str) -> dict[str, Any] | None:
        """Return the document stored under ``name``, or None."""
        row = self._database.execute(
            "SELECT document FROM state WHERE run = ? AND name = ?", (self._run, name)
        ).fetchone()
        return json.loads(row[0]) if row else None

    def store(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Store documents by name, in one transaction."""
        with self._transaction():
            for name, document in states.items():
                self._store(name, document)

    def forget(self, *names: str) -> None:
        """Remove stored documents."""
        with self._transaction():
            self._database.executemany(
                "DELETE FROM state WHERE run = ? AND name = ?", [(self._run, name) for name in names]
            )

    def _store(self, name: str, document: Mapping[str, Any]) -> None:
        self._database.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (self._run, name, json.dumps(document)))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Be one transaction, or join the one that is open."""
        if self._database.in_transaction:
            yield
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk has ended it already
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _migrate(database: sqlite3.Connection) -> None:
    """Make the tables, or bring those of an earlier version up to this one."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    for step in range(version or _VERSION, _VERSION):
        for statement in _MIGRATIONS[step]:
            try:
                database.execute(statement)
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):  # else a crash came between two statements
                    raise
    database.executescript(_SCHEMA)
    database.execute(f"PRAGMA user_version = {_VERSION}")


def _event(row: tuple[Any, ...]) -> Event:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Event(**values | {"path": as_path(values["path"])})


@contextlib.contextmanager
def open_ledger(path: Path, run: str, *, clock: Callable[[], float] = time.time) -> Iterator[Ledger]:
    """Open (or make) the ledger in ``path`` as its only writer.

    Raises
    ------
    ConfigError
        When another process writes it, its folder cannot be written (now, or later: a full disk) or lies on a network
        file system, or it was made by another version.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the state folder {folder} ({error.strerror}); name another with --state-dir"
        ) from error
    if is_remote(folder):
        kind = filesystem_of(folder)
        raise ConfigError(f"the state folder {folder} is on {kind}, where SQLite is not safe; name a local --state-dir")
    with _single_writer(path):
        try:
            database = sqlite3.connect(path, timeout=30, isolation_level=None)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise ConfigError(f"{path} has version {version}, this rksp writes {_VERSION}; use another --state-dir")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
            ledger = Ledger(database, run, clock)
            ledger.check_there(path)
        except sqlite3.Error as error:
            raise ConfigError(f"{path} cannot be used as a ledger ({error}); move it away or fix its folder") from error
        try:
            yield ledger
        except sqlite3.Error as error:
            raise ConfigError(
                f"{path} cannot be written any more ({error}); make room or fix its folder, and start again: "
                "what it holds is kept"
            ) from error
        finally:
            database.close()


@contextlib.contextmanager
def _single_writer(path: Path) -> Iterator[None]:
    """Hold the lock beside the ledger."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(owned(path))
        except Owned as error:
            raise ConfigError(f"this run is already watched by {error}; stop that one first ({path})") from error
        except OSError as error:
            raise ConfigError(f"cannot lock {path} ({error.strerror}); name another --state-dir") from error
        yield
