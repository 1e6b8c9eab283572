"""The endpoint over real sockets: what it answers, and that clients which hang hold up nobody."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from rksp_core.errors import ConfigError
from rksp_monitor import endpoint
from rksp_monitor.endpoint import serve
from tests.monitor.certificates import make_certificate


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Gauge("rksp_risk_level", "Level.", registry=made).set(2)
    Gauge("rksp_sigma_max", "Sigma.", registry=made).set(1)
    return made


@pytest.fixture
def address(registry: CollectorRegistry) -> Iterator[str]:
    with serve("127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: False) as bound:
        yield bound


def ask(address: str, method: str = "GET", path: str = "/metrics", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection(address, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def hang(address: str, count: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Open connections that send half a request line and nothing more."""
    made = []
    for _ in range(count):
        channel = stack.enter_context(connect(address))
        channel.sendall(b"GET /met")
        made.append(channel)
    return made


def is_cut(channel: socket.socket) -> bool:
    try:
        return channel.recv(1) == b""
    except ConnectionResetError:
        return True


def test_metrics_are_served_plain_or_compressed_and_by_name(address: str):
    status, headers, body = ask(address)
    assert (status, headers["Content-Length"]) == (200, str(len(body)))
    assert b"rksp_risk_level 2.0" in body
    status, headers, squeezed = ask(address, Accept_Encoding="gzip")
    assert (headers["Content-Encoding"], gzip.decompress(squeezed)) == ("gzip", body)
    _, _, one = ask(address, path="/metrics?name[]=rksp_sigma_max")
    assert b"rksp_sigma_max 1.0" in one
    assert b"rksp_risk_level" not in one
    _, headers, _ = ask(address, Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/", 200),
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 503),
        ("GET", "/favicon.ico", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/metrics/", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/healthz", 405),
        ("BREW", "/", 405),
    ],
)
def test_statuses(address: str, method: str, path: str, expected: int):
    status, headers, _ = ask(address, method, path)
    assert status == expected
    assert ("Allow" in headers) == (expected == 405)
    assert headers["Server"] == "rksp"  # no version


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: \u00b2", 200),  # which Python calls a digit
        (f"Content-Length: {'9' * 5000}", 200),
        ("Accept: application/openmetrics-text; version=abc", 200),
        ("\r\n".join([f"a: {'x' * 60_000}"] * 2), 431),
    ],
    ids=["no digit", "a long number", "no version", "long headers"],
)
def test_a_strange_head_is_answered(address: str, head: str, status: int):
    with connect(address) as channel:
        channel.sendall(f"GET /metrics HTTP/1.0\r\n{head}\r\n\r\n".encode("latin-1"))
        assert channel.makefile("rb").readline().startswith(f"HTTP/1.0 {status} ".encode())


def test_the_page_links_to_the_three_paths(address: str):
    page = ask(address, path="/")[2].decode()
    assert [f'href="{path}"' in page for path in ("/metrics", "/healthz", "/readyz")] == [True] * 3


def test_head_has_the_headers_of_get_and_no_body(address: str):
    got, head = ask(address), ask(address, "HEAD")
    assert (head[0], head[1]["Content-Length"], head[2]) == (200, got[1]["Content-Length"], b"")


def test_a_body_that_nobody_wants_does_not_lose_the_answer(address: str):
    assert ask(address, "POST", body=b"x" * 60_000)[0] == 405


@pytest.mark.parametrize("said", [b"GET\r\n\r\n", b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_is_a_bad_request(address: str, said: bytes, capfd: pytest.CaptureFixture[str]):
    with connect(address) as channel:
        channel.sendall(said)
        answer = channel.makefile("rb").read()
    assert b"Error code: 4" in answer or b"Error code: 5" in answer or b" 400 " in answer
    assert capfd.readouterr().err == ""


def test_an_endless_request_line_is_refused(address: str):
    with connect(address) as channel:
        channel.sendall(b"G" * (endpoint.LONGEST_LINE + 1))
        assert channel.recv(64).startswith(b"HTTP/1.0 414")


def test_the_oldest_idle_connection_makes_room(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "CONNECTIONS", 10)
    with (
        contextlib.ExitStack() as stack,
        serve("127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: True) as address,
    ):
        hanging = hang(address, 10, stack)
        assert ask(address)[0] == 200
        assert is_cut(hanging[0])
        hanging[1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            hanging[1].recv(1)


def test_when_all_are_being_answered_the_next_one_is_told_so(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "CONNECTIONS", 2)
    reached, go = threading.Semaphore(0), threading.Event()

    def slow() -> bool:
        reached.release()
        return go.wait(20)

    with serve("127.0.0.1:0", registry, healthy=slow, ready=lambda: True) as address:
        waiting = [threading.Thread(target=ask, args=(address, "GET", "/healthz")) for _ in range(2)]
        for thread in waiting:
            thread.start()
            assert reached.acquire(timeout=20)
        with connect(address) as channel:
            assert channel.recv(64).startswith(b"HTTP/1.0 503")
        go.set()
        for thread in waiting:
            thread.join(20)
        assert ask(address)[0] == 200


def test_a_client_that_trickles_is_cut_when_its_time_is_over(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "PATIENCE", 0.5)

    def trickle(channel: socket.socket) -> None:
        for _ in range(200):  # each byte comes in time, the whole never does
            channel.sendall(b"G")
            time.sleep(0.05)

    with (
        serve("127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: True) as address,
        connect(address) as slow,
        pytest.raises(ConnectionError),
    ):
        trickle(slow)


def test_tls_clients_that_never_shake_hands_hold_up_nobody(registry: CollectorRegistry, tmp_path: Path):
    certificate, key = make_certificate(tmp_path, "server")
    config = tmp_path / "web.yaml"
    config.write_text(f"tls_server_config: {{cert_file: {certificate.name}, key_file: {key.name}}}\n")
    with (
        contextlib.ExitStack() as stack,
        serve("127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: True, web_config=config) as address,
    ):
        hang(address, 50, stack)
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(address, timeout=20, context=context)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            assert connection.getresponse().status == 200


def test_the_end_does_not_wait_for_clients_that_hang(registry: CollectorRegistry):
    with contextlib.ExitStack() as stack:
        with serve("127.0.0.1:0", registry, healthy=lambda: True, ready=lambda: True) as address:
            hanging = hang(address, 3, stack)
            assert ask(address)[0] == 200
        assert all(is_cut(channel) for channel in hanging)


def test_a_taken_port_is_said(address: str, registry: CollectorRegistry):
    with (
        pytest.raises(ConfigError, match=r"cannot listen on .* choose another --listen"),
        serve(address, registry, healthy=lambda: True, ready=lambda: True),
    ):
        pass
