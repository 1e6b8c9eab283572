"""Tells webhooks and commands what happened, in the background.

Every receiver has a thread and a bounded queue of its own, so a dead one blocks nobody and takes no more memory.
Events reach a receiver in order, at least once while this process lives; what waits when it ends is tried for a moment
more and then given up: delivery does not survive a restart. Whoever must not miss anything reads the ledger.

Each event is a document "rksp.event/1" (``schemas/event.json``). A webhook gets it as the body of a POST with the
headers of https://www.standardwebhooks.com: ``webhook-id`` (the same at each attempt, for the receiver to drop
repetitions), ``webhook-timestamp``, and ``webhook-signature`` when there is a secret. A command gets it on its standard
input.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import os
import queue
import random
import select
import signal
import ssl
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import standardwebhooks
import tenacity
import urllib3
from structlog.typing import FilteringBoundLogger

from rksp_core.errors import ConfigError
from rksp_core.orders import timestamp
from rksp_monitor.announce_settings import Hook, Receiver, Webhook

Count = Callable[[str, str], object]
Document = Mapping[str, Any]

SCHEMA = "rksp.event/1"
SENT, FAILED, DROPPED = (
    "rksp_notifications_sent_total",
    "rksp_notifications_failed_total",
    "rksp_notifications_dropped_total",
)
PASSING = {408, 425, 429}  # statuses of a receiver that may do better later, like all from 500 up
LONGEST_DELAY = 300.0  # seconds between two attempts
SECRET_BYTES = 24  # the least that Standard Webhooks allows
OUTPUT = 4096  # bytes of a command's output that are kept: the last ones
TICK = 0.1  # seconds between two looks at a command
GRACE = 2.0  # seconds between SIGTERM and SIGKILL to a command that took too long
LAST_MOMENT = 1.0  # seconds that threads have to end after the time to deliver is over

_random = random.SystemRandom()  # the state of the common generator is not ours to touch


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
        senders = [(each, _Post(each)) for each in webhooks], [(each, _Command(each, log)) for each in hooks]
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


@dataclass(frozen=True)
class _Outcome:
    """What one attempt came to; ``passing``: another one may do better, after ``wait`` seconds or more."""

    problem: str
    passing: bool = False
    wait: float = 0.0


class _Post:
    """Posts to a webhook. Its url may be a secret (chat services), so only scheme and host are ever said."""

    def __init__(self, settings: Webhook) -> None:
        parts = urlsplit(settings.url)
        self.name = f"{parts.scheme}://{parts.netloc}"
        self._settings = settings
        secret = _secret(settings, self.name)
        self._signer = None if secret is None else standardwebhooks.Webhook(secret)
        try:
            context = ssl.create_default_context(cafile=settings.ca_file)
        except OSError as error:  # which ssl.SSLError is too
            raise ConfigError(
                f"cannot read certificates for the webhook {self.name} from {settings.ca_file} ({error.strerror})"
            ) from error
        self._pool = _connect_through(
            _proxy(parts.scheme, parts.hostname or ""), ssl_context=context, timeout=settings.timeout, retries=False
        )

    def send(self, document: Document, stop: threading.Event) -> str:
        """Post until it is accepted, refused for good, or tried often enough."""
        body = json.dumps(document)
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda outcome: outcome.passing),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._settings.attempts), tenacity.stop_when_event_set(stop)
            ),
            wait=self._delay,
            sleep=tenacity.sleep_using_event(stop),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        outcome: _Outcome = attempts(self._attempt, document["id"], body)
        return outcome.problem

    def _delay(self, state: tenacity.RetryCallState) -> float:
        """Double the delay at each attempt, give or take half: receivers are not asked in step by many watchers."""
        asked = state.outcome.result().wait if state.outcome else 0.0
        exponent = min(state.attempt_number - 1, 20)
        delay = self._settings.retry_delay * 2.0**exponent * _random.uniform(0.5, 1.5)
        return min(max(delay, asked), LONGEST_DELAY)

    def _attempt(self, identity: str, body: str) -> _Outcome:
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "rksp",
            "webhook-id": identity,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        if self._signer is not None:
            headers["webhook-signature"] = self._signer.sign(identity, now, body)
        try:
            answer = self._pool.request(
                "POST", self._settings.url, body=body, headers=headers, redirect=False, preload_content=False
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            text = str(error).replace(self._settings.url, self.name)
            return _Outcome(f"{type(error).__name__}: {text}", passing=True)
        with contextlib.closing(answer):  # its body is not read: it may have no end
            status = answer.status
            if 200 <= status < 300:
                return _Outcome("")
            if 300 <= status < 400:
                return _Outcome(f"it answered {status}, and redirects are not followed; set url to where it moved")
            retry_after = answer.headers.get("Retry-After", "")
        return _Outcome(
            f"it answered {status}",
            passing=status >= 500 or status in PASSING,
            wait=float(retry_after) if retry_after.isdecimal() and len(retry_after) < 7 else 0.0,
        )


class _Command:
    """Runs a command. It gets the event on standard input, and RKSP_EVENT and RKSP_RUN in its environment."""

    def __init__(self, settings: Hook, log: FilteringBoundLogger) -> None:
        self.name = settings.command[0]
        self._settings, self._log = settings, log.bind(receiver=self.name)

    def send(self, document: Document, stop: threading.Event) -> str:
        """Run it to its end, or to its time limit; a failure is not tried again."""
        # What the service manager told this process is not for others.
        private = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
        environment = {name: value for name, value in os.environ.items() if name not in private}
        environment |= {"RKSP_EVENT": document["event"], "RKSP_RUN": document["run"].replace("\0", "")}
        with tempfile.TemporaryFile() as given:  # a pipe would fill up when the command does not read
            given.write(json.dumps(document).encode() + b"\n")
            given.seek(0)
            try:
                process = subprocess.Popen(  # noqa: S603 - the person who wrote the settings chose the program
                    self._settings.command,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that its children can be ended with it
                )
            except OSError as error:
                return f"it cannot be started ({error.strerror})"
        with cast("IO[bytes]", process.stdout) as pipe:
            ended, output = self._follow(process, pipe, stop)
        if output:
            self._log.debug("output", announced=document["event"], text=output.decode(errors="replace"))
        if not ended:
            return "it was ended with the watcher" if stop.is_set() else f"it took over {self._settings.timeout:g} s"
        code = process.returncode
        return "" if code == 0 else f"exit code {code}" if code > 0 else f"killed by signal {-code}"

    def _follow(self, process: subprocess.Popen[bytes], pipe: IO[bytes], stop: threading.Event) -> tuple[bool, bytes]:
        """Read what it says until it ends or must be ended; return whether it ended by itself, and the last output.

        A child that it left in the background may hold the pipe open, so the end is that of the process.
        """
        os.set_blocking(pipe.fileno(), False)
        deadline = time.monotonic() + self._settings.timeout
        output, is_open = b"", True
        readable = select.poll()  # select() knows no descriptor above 1023
        readable.register(pipe, select.POLLIN)
        while process.poll() is None and time.monotonic() < deadline and not stop.is_set():
            if not is_open:
                stop.wait(TICK)
            elif readable.poll(TICK * 1000):
                read = pipe.read(65536)
                output, is_open = (output + (read or b""))[-OUTPUT:], read != b""
        ended = process.poll() is not None
        if not ended:
            _end_group(process, 0.0 if stop.is_set() else GRACE)
        return ended, (output + (pipe.read(65536) or b""))[-OUTPUT:]


def _proxy(scheme: str, host: str) -> str | None:
    """Return the proxy that https_proxy, http_proxy and no_proxy give this address, as curl reads them."""
    if proxy_bypass(host):
        return None
    return getproxies().get(scheme)


def _connect_through(proxy: str | None, **options: Any) -> urllib3.PoolManager:
    if proxy is None:
        return urllib3.PoolManager(**options)
    try:
        password = urllib3.util.parse_url(proxy).auth
        headers = urllib3.make_headers(proxy_basic_auth=password) if password else None
        return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise ConfigError("http_proxy or https_proxy in the environment is no http://HOST:PORT") from error


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and its children, by force after ``grace`` seconds."""
    if grace:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _secret(settings: Webhook, name: str) -> bytes | None:
    """Read the signing secret, which is never in the settings: those are shown, committed and mailed."""
    if settings.secret_file is not None:
        source = str(settings.secret_file)
        try:
            text = settings.secret_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"cannot read the secret of the webhook {name} from {source} ({reason})") from None
    elif settings.secret_env is not None:
        source = f"the variable {settings.secret_env}"
        if settings.secret_env not in os.environ:
            raise ConfigError(f"{source}, which holds the secret of the webhook {name}, is not set")
        text = os.environ[settings.secret_env]
    else:
        return None
    encoded = text.strip().removeprefix("whsec_").rstrip("=")
    try:
        secret = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"{source} must hold base64 of at least {SECRET_BYTES} bytes, as the secret of the webhook {name}; "
            "make one with `openssl rand -base64 32`"
        )
    return secret


def _plain(value: Any) -> Any:
    """Return a value as what JSON has: numbers that are not finite are null, and what else there is its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
