"""What a service manager says to a daemon and hears from it: signals, and systemd's notification socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator


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
    """Call a handler for each of these signals, in a thread of its own.

    An ordinary handler runs between two bytecodes of the main thread, which may hold the very lock that the handler
    needs (`threading.Event` is not re-entrant); a thread that waits for signals has no such trap. Signals stay
    blocked when the context ends: a second SIGTERM while stopping changes nothing.
    """
    wanted = set(handlers)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def listen() -> None:
        while True:
            handlers[signal.Signals(signal.sigwait(wanted))]()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    yield
