"""Tells webhooks and commands what happened, in the background.

Every receiver has a thread and a bounded queue of its own, so a dead one blocks nobody and takes no more memory.
Events reach a receiver in order, sometimes twice, and not at all when every attempt failed or too many waited. What
waits when the process ends is tried for a moment more and then given up. Delivery does not survive a restart.
All of it is counted, and whoever must not miss anything reads the ledger.

Each event is a document "rksp.event/1" (``schemas/event.json``). A webhook gets it as the body of a POST with the
headers of https://www.standardwebhooks.com: ``webhook-id`` (the same at each attempt, for the receiver to drop
repetitions), ``webhook-timestamp``, and ``webhook-signature`` when there is a secret. A command gets it on its standard
input.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from structlog.typing import FilteringBoundLogger

from rksp_core.orders import timestamp
from rksp_monitor.announce_settings import Hook, Receiver, Webhook
from rksp_monitor.hook import Command
from rksp_monitor.webhook import Post

Count = Callable[[str, str], object]
Document = Mapping[str, Any]

SCHEMA = "rksp.event/1"
SENT, FAILED, DROPPED = (
    "rksp_notifications_sent_total",
    "rksp_notifications_failed_total",
    "rksp_notifications_dropped_total",
)
LAST_MOMENT = 1.0  # seconds that threads have to end after the time to deliver is over


class Announcer:
    """Tells webhooks and commands what happened; `announce` never blocks and never raises.

    Parameters
    ----------
    webhooks, hooks
        Who is told.
    log
        Where failures and drops are said.
    count
        Called with (run, name of a counter in `rksp_monitor.metrics`) for each event sent, failed or dropped, such as
        `rksp_monitor.metrics.Board.count`; a KeyError (the run is gone) is no matter.

    Raises
    ------
    ConfigError
        When a secret or a certificate cannot be read.
    """

    def __init__(
        self,
        webhooks: Iterable[Webhook],
        hooks: Iterable[Hook],
        log: FilteringBoundLogger,
        *,
        count: Count = lambda *_: None,
    ) -> None:
        senders = [(each, Post(each)) for each in webhooks], [(each, Command(each, log)) for each in hooks]
        self._outboxes = [_Outbox(settings, sender, log, count) for group in senders for settings, sender in group]

    def announce(self, event: str, run: str, document: Document) -> None:
        """Tell every receiver that asked for ``event``, one of `rksp_monitor.announce_settings.EVENTS`.

        ``document`` is added to what every event says (schema, id, event, run, at); it is copied at once.
        """
        interested = [outbox for outbox in self._outboxes if event in outbox.settings.events]
        if interested:
            said = {
                **document,
                "schema": SCHEMA,
                "id": f"evt_{uuid.uuid4().hex}",
                "event": event,
                "run": run,
                "at": timestamp(time.time()),
            }
            plain = _plain(said)
            for outbox in interested:
                outbox.put(plain)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what waits for at most ``timeout`` seconds, then give up the rest and say how much it was."""
        deadline = time.monotonic() + timeout
        for outbox in self._outboxes:
            outbox.finish()
        for outbox in self._outboxes:
            outbox.join(deadline)
        for outbox in self._outboxes:
            outbox.give_up()
        for outbox in self._outboxes:  # commands are being killed; a webhook's thread may stay in its socket
            outbox.join(max(deadline, time.monotonic()) + LAST_MOMENT)


class _Sender(Protocol):
    """One way to tell somebody."""

    name: str

    def send(self, document: Document, stop: threading.Event) -> str:
        """Return "" when it was told, else why not; gives up soon after ``stop`` is set."""


class _Outbox:
    """What waits for one receiver, and the thread that sends it."""

    def __init__(self, settings: Receiver, sender: _Sender, log: FilteringBoundLogger, count: Count) -> None:
        self.settings = settings
        self._sender, self._log, self._count = sender, log.bind(receiver=sender.name), count
        self._waiting: queue.SimpleQueue[Document | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(settings.queue)
        self._stop, self._ended = threading.Event(), False
        self._overflowing = False
        self._thread = threading.Thread(target=self._work, name=f"announce to {sender.name}", daemon=True)
        self._thread.start()

    def put(self, document: Document) -> None:
        if not self._ended and self._room.acquire(blocking=False):
            self._waiting.put(document)
            return
        self._note(document, DROPPED)
        if not self._ended and not self._overflowing:
            self._overflowing = True
            self._log.warning("events are dropped", reason=f"{self.settings.queue} wait for this receiver already")

    def finish(self) -> None:
        """Take no more; the thread ends when it has sent what waits."""
        self._ended = True
        self._waiting.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread, at most until ``deadline`` on the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def give_up(self) -> None:
        """Send nothing further, and say what is lost."""
        self._stop.set()
        lost = 0
        with contextlib.suppress(queue.Empty):
            while True:
                document = self._waiting.get_nowait()
                if document is not None:
                    lost += 1
                    self._note(document, DROPPED)
        self._waiting.put(None)
        if lost:
            self._log.warning("events are dropped", reason="the watcher ends", events=lost)

    def _work(self) -> None:
        while not self._stop.is_set() and (document := self._waiting.get()) is not None:
            self._room.release()
            try:
                problem = self._sender.send(document, self._stop)
            except Exception as error:  # noqa: BLE001 - the events behind this one are to be sent all the same
                problem = f"{type(error).__name__}: {error}"
            self._note(document, FAILED if problem else SENT)
            about = {"announced": document["event"], "run": document["run"], "id": document["id"]}
            if problem:
                self._log.error("event not delivered", **about, problem=problem)
                continue
            self._log.debug("event delivered", **about)
            if self._overflowing:
                self._overflowing = False
                self._log.info("events are delivered again")

    def _note(self, document: Document, name: str) -> None:
        with contextlib.suppress(KeyError):
            self._count(document["run"], name)


def _plain(value: Any) -> Any:
    """Return a value as what JSON has: numbers that are not finite are null, and what else there is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
