"""How long a scrape takes, alone and beside clients that open a connection and then say nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator

from tests.soak.beside import Beside

HALF_A_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: slow\r\nX-Never-Ends: "


class Scraper(Beside):
    """Scrapes again and again until the context ends; ``seconds`` holds how long each scrape took."""

    def __init__(self, address: tuple[str, int], every: float = 0.1) -> None:
        super().__init__()
        self._address, self._every = f"http://{address[0]}:{address[1]}/metrics", every
        self.seconds: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._over.wait(self._every):
            began = time.perf_counter()
            try:
                with urllib.request.urlopen(self._address, timeout=30) as answer:
                    answer.read()
            except OSError as error:
                self.failed.append(str(error))
            self.seconds.append(time.perf_counter() - began)


@contextlib.contextmanager
def slow_clients(address: tuple[str, int], count: int) -> Iterator[None]:
    """Keep so many connections with half a request each; one that is closed is opened again."""
    over = threading.Event()

    def hang() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as client:
                client.sendall(HALF_A_REQUEST)
                client.settimeout(0.2)
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        if client.recv(4096) == b"":
                            break
            over.wait(0.05)

    clients = [threading.Thread(target=hang, daemon=True) for _ in range(count)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        over.set()
        for client in clients:
            client.join()
