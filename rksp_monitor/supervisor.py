"""What a service manager says to a daemon and hears from it: signals, and systemd's notification socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Notifier:
    """Sends READY, STATUS, WATCHDOG and STOPPING to the socket that systemd names; silent where there is none."""

    def __init__(self, address: str | None = None) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._last_status = ""

    def send(self, message: str) -> None:
        """Send one ``KEY=value`` message; a manager that does not listen is no error."""
        if not self._address:
            return
        # A leading @ means an abstract socket, which Linux writes as a zero byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(message.encode(), address)

    def status(self, text: str) -> None:
        """Send a STATUS line when it changed."""
        if text != self._last_status:
            self._last_status = text
            self.send(f"STATUS={text}")


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
