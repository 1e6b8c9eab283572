"""How many threads of runs work at once.

Python runs one thread at a time. When fifty runs are taken up together, or look at their folders together, whoever has
little to do (a scrape, above all) waits for every one of them, again and again: each system call gives the interpreter
away. So the threads of runs take a seat for what they do between two waits.

A seat is lent, for `LEASE` seconds: a run that hangs in a dead mount, or looks through a hundred thousand files, keeps
it no longer than that from the others, and goes on without one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

SEATS = 1
LEASE = 0.1  # seconds


class Desk:
    """``with desk:`` waits for a seat and leaves it in the end; a thread that has one takes no second.

    First come first served, so that runs which are taken up together get on together.

    Parameters
    ----------
    seats
        Threads that work at once, as long as none of them exceeds its lease.
    lease
        Seconds after which a thread no longer counts.
    """

    def __init__(self, seats: int = SEATS, lease: float = LEASE) -> None:
        self._seats, self._lease = seats, lease
        self._queue: deque[_Guest] = deque()
        self._seated: set[_Guest] = set()
        self._lock = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> Self:
        """Wait for a seat: whoever sits is soon up, or soon counts no more."""
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth == 1:
            self._sit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the seat."""
        self._own.depth -= 1
        if self._own.depth == 0:
            self._rise()

    def rest(self) -> None:
        """Let those who wait go first, once the lease of one's own seat is over: called in the midst of long work."""
        if self._queue and time.monotonic() > self._own.guest.until:
            self._rise()
            self._sit()

    def _sit(self) -> None:
        self._own.guest = guest = _Guest()
        with self._lock:
            self._queue.append(guest)
            self._admit()
        while not guest.called.wait(self._lease):
            with self._lock:
                self._admit()

    def _rise(self) -> None:
        with self._lock:
            self._seated.remove(self._own.guest)
            self._admit()

    def _admit(self) -> None:
        """Seat those who wait, as long as there is room."""
        now = time.monotonic()
        while self._queue and sum(guest.until > now for guest in self._seated) < self._seats:
            guest = self._queue.popleft()
            guest.until = now + self._lease
            self._seated.add(guest)
            guest.called.set()


@dataclass(eq=False)
class _Guest:
    """A thread at the desk, and the end of its lease."""

    called: threading.Event = field(default_factory=threading.Event)
    until: float = 0.0
