"""The HTTP endpoint: ``/metrics`` by prometheus_client, ``/healthz`` and ``/readyz`` beside it, TLS and basic auth.

Every connection has a thread of its own, in which the TLS handshake happens too, so a client that says nothing holds up
nobody. It has `PATIENCE` seconds to be done, however it spends them; and when `CONNECTIONS` are open, a new one takes
the place of the one that has kept us waiting longest for its request. Each connection serves one request (HTTP/1.0).
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from typing import Any, cast
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from rksp_core.errors import ConfigError
from rksp_monitor.exposition import Exposition
from rksp_monitor.passwords import Guard
from rksp_monitor.web_config import OPEN, Rules, WebConfig

Probe = Callable[[], bool]
Answer = tuple[HTTPStatus, Mapping[str, str], bytes]

PATIENCE = 10.0  # seconds from accepting a connection to the end of its answer
CONNECTIONS = 200  # open at once
LONGEST_LINE = 65536  # bytes of a request's first line, of its head, and of a body that is read to be ignored
MOST_DIGITS = 20  # of a number in a header

TEXT = {"Content-Type": "text/plain; charset=utf-8"}
HTML = {"Content-Type": "text/html; charset=utf-8"}
PAGE = b"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>rksp watch</title></head><body><h1>rksp watch</h1><ul>
<li><a href="/metrics">/metrics</a> for Prometheus</li>
<li><a href="/healthz">/healthz</a>: does the watcher work?</li>
<li><a href="/readyz">/readyz</a>: has it started?</li>
</ul></body></html>
"""


@contextlib.contextmanager
def serve(
    listen: str,
    registry: CollectorRegistry,
    *,
    healthy: Probe,
    ready: Probe,
    web_config: Path | None = None,
    warn: Callable[[str], object] = lambda _: None,
) -> Iterator[str]:
    """Serve until the context ends; yields the address in use, ``host:port`` (port 0 picks a free one).

    Parameters
    ----------
    listen
        ``host:port``, ``[::1]:port`` for IPv6.
    registry
        What ``/metrics`` shows.
    healthy, ready
        Whether ``/healthz`` and ``/readyz`` answer 200 rather than 503; they are outside basic auth.
    web_config
        See `rksp_monitor.web_config`; None serves plain HTTP to everybody.
    warn
        Told once when a changed ``web_config`` cannot be used.

    Raises
    ------
    ConfigError
        When the address is malformed or taken, or ``web_config`` cannot be used.
    """
    host, port = parse_address(listen)
    web = None if web_config is None else WebConfig(web_config, warn)
    site = _Site(registry, Exposition(registry), {"/healthz": healthy, "/readyz": ready}, Guard())
    server_class = _Server6 if ":" in host else _Server
    try:
        server = server_class((host, port), site, web)
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen} ({error.strerror}); choose another --listen") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="endpoint", daemon=True)
    thread.start()
    try:
        bound = server.server_address[1]
        yield f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
        site.guard.close()


def parse_address(listen: str) -> tuple[str, int]:
    """Split ``host:port``.

    Raises
    ------
    ConfigError
        When it is none.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"an address is host:port, such as 127.0.0.1:9109, got {listen!r}")
    return host.strip("[]"), int(port)


@dataclass(eq=False)
class _Connection:
    """A connection between its acceptance and its end."""

    channel: socket.socket
    since: float = field(default_factory=time.monotonic)
    asked: bool = False  # whether its request has been read

    def cut(self) -> None:
        """End it from another thread: whoever reads or writes there gets an error, TLS or not."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.channel, socket.SHUT_RDWR)


class _Server(TCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], site: _Site, web_config: WebConfig | None) -> None:
        self._site, self._web_config = site, web_config
        self._open: dict[int, _Connection] = {}  # in the order of arrival
        self._lock = threading.Lock()
        super().__init__(address, BaseRequestHandler)  # handlers are made in `_serve`

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, in the place of the oldest idle one when there are too many.

        The newcomer, most likely a scrape, is answered in milliseconds; whoever has waited longest is the hanging one.
        """
        request.settimeout(PATIENCE)
        connection = _Connection(request)
        with self._lock:
            if len(self._open) >= CONNECTIONS:
                idle = next((key for key, each in self._open.items() if not each.asked), None)
                if idle is None:  # every one of them is being answered
                    self._turn_away(request)
                    return
                self._open.pop(idle).cut()
            self._open[id(connection)] = connection
        thread = threading.Thread(target=self._serve, args=(connection, client_address), name="endpoint client")
        thread.daemon = True
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._close(connection)

    def service_actions(self) -> None:
        """Cut the connections whose time is over; called several times a second."""
        late = time.monotonic() - PATIENCE
        with self._lock:
            for connection in self._open.values():
                if connection.since > late:
                    break
                connection.cut()

    def server_close(self) -> None:
        """Stop listening, and cut whoever is still there."""
        super().server_close()
        with self._lock:
            for connection in self._open.values():
                connection.cut()

    def _serve(self, connection: _Connection, client_address: Any) -> None:
        try:
            rules = self._web_config.rules() if self._web_config is not None else OPEN
            if rules.context is not None:
                # No handshake before the connection is known by its new socket, so that it can be cut.
                connection.channel = rules.context.wrap_socket(
                    connection.channel, server_side=True, do_handshake_on_connect=False
                )
                connection.channel.do_handshake()
            _Handler(connection, client_address, self, self._site, rules)
        except OSError:  # the client went away, was too slow, or speaks no TLS: no news
            pass
        finally:
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        with self._lock:
            self._open.pop(id(connection), None)
        self.shutdown_request(connection.channel)

    def _turn_away(self, request: socket.socket) -> None:
        with contextlib.suppress(OSError):
            request.settimeout(0)
            if self._web_config is None:  # in TLS there is no way to say it
                request.send(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)


class _Server6(_Server):
    address_family = socket.AF_INET6


@dataclass(frozen=True)
class _Site:
    """What is served; ``answer`` is a function of the request alone."""

    registry: CollectorRegistry
    exposition: Exposition
    probes: Mapping[str, Probe]
    guard: Guard

    def answer(self, method: str, target: str, headers: Message, address: str, rules: Rules) -> Answer:
        path, _, query = target.partition("?")
        reads = method in {"GET", "HEAD"}
        if reads and path in self.probes:
            if self.probes[path]():
                return HTTPStatus.OK, TEXT, b"ok\n"
            return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, b"not now\n"
        if rules.users:
            admitted = self.guard.admit(rules.users, headers.get("Authorization", ""), address)
            if admitted == "busy":
                return HTTPStatus.TOO_MANY_REQUESTS, TEXT | {"Retry-After": "1"}, b"too many passwords at once\n"
            if admitted == "refused":
                asks = {"WWW-Authenticate": 'Basic realm="rksp", charset="UTF-8"'}
                return HTTPStatus.UNAUTHORIZED, TEXT | asks, b"name and password, please\n"
        if not reads:
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT | {"Allow": "GET, HEAD"}, b"GET or HEAD\n"
        if path == "/metrics":
            return self._metrics(query, headers)
        if path == "/":
            return HTTPStatus.OK, HTML, PAGE
        return HTTPStatus.NOT_FOUND, TEXT, b"see /metrics, /healthz and /readyz\n"

    def _metrics(self, query: str, headers: Message) -> Answer:
        try:
            encode, content_type = choose_encoder(headers.get("Accept", ""))
        except (TypeError, ValueError):  # it stumbles over a version that is no number
            encode, content_type = choose_encoder("")
        names = parse_qs(query).get("name[]")
        some = self.registry.restricted_registry(names) if names else None
        body = self.exposition.text(encode, content_type) if some is None else encode(some)
        answer = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(headers.get("Accept-Encoding", "")):
            # 0.2 ms for 50 runs; the default level takes 4 ms, more than all the rest, to save a fifth of the bytes.
            return HTTPStatus.OK, answer | {"Content-Encoding": "gzip"}, gzip.compress(body, 1)
        return HTTPStatus.OK, answer, body


class _Head:
    """The header lines of a request, `LONGEST_LINE` bytes in all: the library would keep 100 lines of that length."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream, self._left = stream, LONGEST_LINE

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise HTTPException(f"more than {LONGEST_LINE} bytes of headers")
        return line


class _Handler(BaseHTTPRequestHandler):
    """Reads one request and writes its answer."""

    def __init__(self, connection: _Connection, address: Any, server: _Server, site: _Site, rules: Rules) -> None:
        self._connection, self._site, self._rules = connection, site, rules
        super().__init__(connection.channel, address, server)

    def handle(self) -> None:
        """Answer the one request of this connection."""
        self.raw_requestline = self.rfile.readline(LONGEST_LINE + 1)
        if len(self.raw_requestline) > LONGEST_LINE:
            self.requestline, self.request_version, self.command = "", "HTTP/1.0", ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return
        stream, self.rfile = self.rfile, cast("BufferedIOBase", _Head(self.rfile))
        try:
            if not self.parse_request():  # which has answered
                return
        finally:
            self.rfile = stream
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and len(length) < MOST_DIGITS:  # a close with bytes unread would take the answer with it
            self.rfile.read(min(int(length), LONGEST_LINE))
        self._connection.asked = True
        status, headers, body = self._site.answer(
            self.command, self.path, self.headers, str(self.client_address[0]), self._rules
        )
        self.send_response(status)
        for name, value in (*headers.items(), *self._rules.headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """Return the Server header: no version for strangers."""
        return "rksp"

    def log_message(self, *_: Any) -> None:
        """Log no requests: a scrape every few seconds is no news."""
