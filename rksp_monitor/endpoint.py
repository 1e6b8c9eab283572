"""The HTTP endpoint: ``/metrics`` by prometheus_client, ``/healthz`` and ``/readyz`` beside it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from rksp_core.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Probe = Callable[[], bool]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Without the reverse look-up of the host's name that WSGIServer makes: it can take seconds.
        super(WSGIServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log no requests: a scrape every few seconds is no news."""


@contextlib.contextmanager
def serve(
    listen: str,
    registry: CollectorRegistry,
    *,
    healthy: Probe,
    ready: Probe,
    web_config: Path | None = None,
    warn: Callable[[str], object] = lambda text: None,
) -> Iterator[str]:
    """Serve until the context ends; yields the address in use, ``host:port`` (port 0 picks a free one).

    Raises
    ------
    ConfigError
        When the address is malformed or taken.
    """
    host, port = parse_address(listen)
    server_class = _Server6 if ":" in host else _Server
    try:
        server = make_server(host, port, _application(registry, healthy, ready), server_class, _Handler)
    except OSError as error:
        raise ConfigError(f"cannot listen on {listen} ({error.strerror}); choose another --listen") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def parse_address(listen: str) -> tuple[str, int]:
    """Split ``host:port``.

    Raises
    ------
    ConfigError
        When it is none.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"an address is host:port, such as 127.0.0.1:9109, got {listen!r}")
    return host.strip("[]"), int(port)


def _application(registry: CollectorRegistry, healthy: Probe, ready: Probe) -> Any:
    metrics = make_wsgi_app(registry)
    probes = {"/healthz": healthy, "/readyz": ready}

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        if path in probes:
            good = probes[path]()
            status, text = ("200 OK", b"ok\n") if good else ("503 Service Unavailable", b"not now\n")
        else:
            status, text = "404 Not Found", b"see /metrics, /healthz and /readyz\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]

    return application
