"""A real process of ``rksp watch``, seen from outside: its endpoint, its log, its memory, its workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.soak.beside import Beside

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "RKSP_REPLAY__SAMPLES": "64",
    "RKSP_REPLAY__SEQUENCES": "4",
    "RKSP_REPLAY__RETRY_DELAY": "0.1",
    "RKSP_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
}


class Watch:
    """One process. ``place`` keeps its log and the address it serves at; the run folders may lie anywhere.

    ``prefix`` is a command that runs the process, such as ``setpriv``; further keywords are environment variables.
    """

    def __init__(self, place: Path, *arguments: str | Path, prefix: Sequence[str] = (), **variables: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.port_file, self.log_file = place / "address", place / "log"
        self.port_file.unlink(missing_ok=True)
        command = [*prefix, sys.executable, "-m", "rksp_monitor", "watch"]
        command += ["--listen", "127.0.0.1:0", "--port-file", str(self.port_file), *map(str, arguments)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | SETTINGS | variables
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.port_file.read_text().strip().rpartition(":")
        return host, int(port)

    def get(self, path: str) -> str:
        """Return what the endpoint answers."""
        host, port = self.address
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """Return every sample by its name and labels, as in ``rksp_risk_level{run="a"}``."""
        lines = [line.rpartition(" ") for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def metric(self, name: str, run: str | None = None) -> float:
        """Return a sample of a run (of the first one there is); NaN while there is none."""
        for key, value in self.metrics().items():
            if key.partition("{")[0] == name and (run is None or f'run="{run}"' in key):
                return value
        return float("nan")

    def logged(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the log's lines, those of one event, or all."""
        lines = []
        for text in self.log_file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line may be half written
                line = json.loads(text)
                if isinstance(line, dict) and event in (None, line.get("event")):
                    lines.append(line)
        return lines

    def workers(self) -> list[int]:
        """Return the processes that replay checkpoints."""
        return [pid for pid in _children(self.process.pid) if b"replay_worker" in _command(pid)]


class Memory(Beside):
    """Samples the resident memory of a watcher and its workers, in MiB, until the context ends."""

    def __init__(self, watch: Watch, interval: float = 0.1) -> None:
        super().__init__()
        self._watch, self._interval = watch, interval
        self.samples: list[tuple[float, float, float]] = []  # (seconds since the start, daemon, workers)
        self.peak_daemon = self.peak_worker = 0.0

    def run(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._interval):
            daemon = _status(self._watch.process.pid)
            workers = [_status(pid) for pid in self._watch.workers()]
            own, theirs = daemon.get("VmRSS", 0.0), sum(worker.get("VmRSS", 0.0) for worker in workers)
            self.samples.append((time.monotonic() - began, own, theirs))
            self.peak_daemon = max(self.peak_daemon, daemon.get("VmHWM", 0.0))
            self.peak_worker = max([self.peak_worker, *(worker.get("VmHWM", 0.0) for worker in workers)])


@contextlib.contextmanager
def ledger(run: Path) -> Iterator[sqlite3.Connection]:
    """Open the one ledger of a run folder for reading."""
    (path,) = (run / ".rksp").glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        yield database


def rows(run: Path) -> list[tuple[str, int, str, str, int, str]]:
    """Return (kind, step, path, status, attempts, error) of every event, in the order it was first seen."""
    with ledger(run) as database:
        return database.execute("SELECT kind, step, path, status, attempts, error FROM events ORDER BY id").fetchall()


def open_rows(run: Path) -> int:
    """Return the number of events that still wait for an outcome."""
    with ledger(run) as database:
        waiting = "SELECT COUNT(*) FROM events WHERE status IN ('seen', 'ready', 'processing')"
        return database.execute(waiting).fetchone()[0]


def documents(run: Path) -> Mapping[str, Any]:
    """Return what the ledger remembers between events, by name."""
    with ledger(run) as database:
        return {name: json.loads(text) for name, text in database.execute("SELECT name, document FROM state")}


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            # The name before it, in brackets, may hold spaces.
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid:
                found.append(int(entry.name))
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _status(pid: int) -> dict[str, float]:
    """Return VmRSS and VmHWM (the peak) of a process in MiB; nothing when it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {line.partition(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
    return {}
