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
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from rksp_core.errors import ConfigError
from rksp_monitor.checkpoints import Kind
from rksp_monitor.discovery import Sighting

Status = Literal["seen", "ready", "processing", "done", "failed", "expired", "skipped"]
STATUSES: tuple[Status, ...] = ("seen", "ready", "processing", "done", "failed", "expired", "skipped")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, kind TEXT NOT NULL, step INTEGER NOT NULL, fingerprint TEXT NOT NULL,
    path TEXT NOT NULL, format TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', profile TEXT,
    first_seen REAL NOT NULL, updated REAL NOT NULL,
    UNIQUE (run, kind, step, fingerprint, path));
CREATE INDEX IF NOT EXISTS events_status ON events (run, status, step);
CREATE INDEX IF NOT EXISTS events_path ON events (run, path);
CREATE TABLE IF NOT EXISTS state (run TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL,
    PRIMARY KEY (run, name));
"""
_VERSION = 1
_COLUMNS = "id, kind, step, fingerprint, path, format, status, attempts, error, first_seen"
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


class Ledger:
    """The state of one run. Open it with `open_ledger`, which holds the lock of its single writer."""

    def __init__(self, database: sqlite3.Connection, run: str, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._run = run
        self._clock = clock
        self._recorded: set[tuple[Path, str]] = set()  # complete ones: every scan sees them all again
        database.executescript(_SCHEMA)

    # -- events

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
            fresh = self._insert(sighting, sighting.fingerprint, "ready", "", now)
            if fresh:
                self._database.execute(
                    f"UPDATE events SET status = 'expired', error = 'written again', updated = ? "  # noqa: S608
                    f"WHERE {same} AND fingerprint != ? AND status = 'ready'",
                    (now, *key, sighting.fingerprint),
                )
        self._recorded.add((sighting.path, sighting.fingerprint))
        return fresh

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

    def judged_before(self, event: Event) -> bool:
        """Whether the same path was judged with other content."""
        row = self._database.execute(
            "SELECT 1 FROM events WHERE run = ? AND path = ? AND status = 'done' AND id != ? LIMIT 1",
            (self._run, str(event.path), event.id),
        ).fetchone()
        return row is not None

    def recover(self) -> int:
        """Make events that a crash left in processing ready again; return how many."""
        with self._transaction():
            return self._database.execute(
                "UPDATE events SET status = 'ready' WHERE run = ? AND status = 'processing'", (self._run,)
            ).rowcount

    def reopen_checkpoints(self, subject: str) -> int:
        """Make checkpoints that failed or were skipped with another subject ready again; return how many.

        ``subject`` names the model, probe and settings that they are replayed with now; it is remembered.
        """
        if (self.load("subject") or {}).get("is") == subject:
            return 0
        with self._transaction():
            self._store("subject", {"is": subject})
            return self._database.execute(
                "UPDATE events SET status = 'ready', attempts = 0, not_before = 0"
                " WHERE run = ? AND kind = 'checkpoint' AND status IN ('failed', 'skipped')",
                (self._run,),
            ).rowcount

    def retry(self, event: Event, error: str, delay: float) -> None:
        """Make a failed attempt ready again after ``delay`` seconds."""
        self._move(event, "ready", error=error, not_before=self._clock() + delay)

    def close_event(self, event: Event, status: Status, error: str) -> None:
        """Mark the event as failed, expired or skipped, and why."""
        self._move(event, status, error=error)

    def finish(self, event: Event, profile: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]) -> None:
        """Mark the event as done, with its profile and the states after it, in one transaction."""
        with self._transaction():
            self._move(event, "done", error="", profile=json.dumps(profile))
            for name, document in states.items():
                self._store(name, document)

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


def _event(row: tuple[Any, ...]) -> Event:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Event(**values | {"path": Path(values["path"])})


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
    kind = filesystem_of(folder)
    if kind in REMOTE:
        raise ConfigError(f"the state folder {folder} is on {kind}, where SQLite is not safe; name a local --state-dir")
    with _single_writer(path):
        try:
            database = sqlite3.connect(path, timeout=30, isolation_level=None)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise ConfigError(f"{path} has version {version}, this rksp writes {_VERSION}; use another --state-dir")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA user_version = {_VERSION}")
            ledger = Ledger(database, run, clock)
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
    """Hold the lock beside the ledger; the owner's name lies in a third file, for whoever is refused."""
    owner = path.with_suffix(".owner")
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        with contextlib.suppress(OSError):
            who = owner.read_text(encoding="utf-8").strip()
            raise ConfigError(f"this run is already watched by {who}; stop that one first ({path})") from error
        raise ConfigError(f"this run is already watched by another process; stop that one first ({path})") from error
    except OSError as error:
        raise ConfigError(f"cannot lock {path} ({error.strerror}); name another --state-dir") from error
    try:
        with contextlib.suppress(OSError):  # a courtesy; a folder that is really not writable is found out next
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        lock.release()


REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "ceph", "afs", "beegfs", "fuse.sshfs"}
)


def filesystem_of(folder: Path) -> str:
    """Return the type of the file system that holds the folder, as Linux names it; "" where that is unknown."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    real = folder.resolve()
    mounts = {Path(fields[1].replace("\\040", " ")): fields[2] for line in lines if len(fields := line.split()) > 2}
    return next((mounts[parent] for parent in (real, *real.parents) if parent in mounts), "")
