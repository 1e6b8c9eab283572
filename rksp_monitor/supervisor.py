"""What a service manager says to a daemon and hears from it: signals, and systemd's notification socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

PATIENCE = 1.0  # seconds that a message to the manager may take


class Notifier:
    """Tells systemd (``Type=notify-reload`` or ``notify``) how the process is; silent where no manager listens.

    Sending never blocks for longer than `PATIENCE` and never raises. See sd_notify(3).
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._last_status = ""

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between two `watchdog` calls: half of what the manager waits; None when it does not watch us."""
        # A child inherits the variables, but the manager watches only the process that it started.
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return None
        limit = os.environ.get("WATCHDOG_USEC", "")
        return int(limit) / 2e6 if limit.isdecimal() and int(limit) > 0 else None

    def ready(self) -> None:
        """Say that the start, or a reload, is over."""
        self.send("READY=1")

    def reloading(self) -> None:
        """Say that the settings are being read again; `ready` ends it, whether the new ones were taken or not."""
        self.send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Say that the process is on its way out."""
        self.send("STOPPING=1")

    def watchdog(self) -> None:
        """Say that the work goes on; to be called from the work itself, not from a thread that always runs."""
        self.send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for that much longer to start, reload or stop, from now on."""
        self.send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """Send a STATUS line when it changed."""
        line = " ".join(text.split())  # a name with a line break would begin another message, such as MAINPID=
        if line != self._last_status:
            self._last_status = line
            self.send(f"STATUS={line}")

    def send(self, message: str) -> None:
        """Send ``KEY=value`` lines; a manager that does not listen is no error."""
        if not self._address:
            return
        # A leading @ means an abstract socket, which Linux writes as a zero byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(PATIENCE)  # a manager that reads no more fills its queue, and then sending blocks
            channel.sendto(message.encode(errors="backslashreplace"), address)


@contextlib.contextmanager
def signals(handlers: dict[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Call a handler for each of these signals, in a thread of its own, until the context ends.

    An ordinary handler runs between two bytecodes of the main thread, which may hold the very lock that the handler
    needs (`threading.Event` is not re-entrant); so the interpreter only writes the signal's number to a socket, and
    a thread reads it. (Blocking the signals for `sigwait` is no way: numerical libraries start threads when they are
    imported, and the signal would end the process through one of those.)
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _noted) for number in handlers}
    previous = signal.set_wakeup_fd(writer.fileno())

    def listen() -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in before:
                    handlers[signal.Signals(number)]()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join(timeout=5)
        reader.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the number is on its way to the thread that listens."""
