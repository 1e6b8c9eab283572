"""What a scrape takes: alone, beside clients that hang, and beside clients that guess passwords.

    python benchmarks/scrape.py [--runs 50] [--clients 50] [--scrapes 300]

A board of 50 runs, every gauge set, is served by a process of its own, where each second every gauge of every run gets
another value; another scrapes it, one request after the other, as Prometheus does. Half of the hanging clients send
half a request line and nothing more, half send nothing at all (in TLS, both hang in the handshake). Guessing clients
try wrong passwords as fast as they are answered. Prints p50 and p99, each also as a ratio of the same scrapes without
other clients.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import itertools
import multiprocessing
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import bcrypt
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rksp_monitor.endpoint import serve  # noqa: E402
from rksp_monitor.metrics import METRICS, Board, registry_of  # noqa: E402

TARGET = 0.050  # seconds
PASSWORD = "benchmark"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("--runs", 50), ("--clients", 50), ("--scrapes", 300)):
        parser.add_argument(name, type=int, default=value)
    arguments = parser.parse_args()
    runs, clients, count = arguments.runs, arguments.clients, arguments.scrapes
    print(f"a board of {runs} runs, {count} scrapes; the target is a p99 under {TARGET * 1e3:.0f} ms")
    with tempfile.TemporaryDirectory() as folder:
        tls, password = make_web_configs(Path(folder))
        for protocol, config in (("http", None), ("https", tls)):
            with serving(runs, config) as address:
                alone = scrape(address, config, count)
                report(f"{protocol}, alone", alone, alone)
                with hanging(address, clients):
                    report(f"{protocol}, beside {clients} that hang", scrape(address, config, count), alone)
        with serving(runs, password) as address:
            alone = scrape(address, None, count)
            report("http with password, alone", alone, alone)
            with guessing(address, 8):
                report("http with password, beside 8 that guess", scrape(address, None, count), alone)


def report(name: str, times: list[float], alone: list[float]) -> None:
    p50, p99 = np.percentile(times, [50, 99])
    r50, r99 = (p50, p99) / np.percentile(alone, [50, 99])
    verdict = "met" if p99 < TARGET else "MISSED"
    print(f"{name:42} p50 {p50 * 1e3:6.2f} ms ({r50:4.2f} x)   p99 {p99 * 1e3:6.2f} ms ({r99:4.2f} x)   {verdict}")


@contextlib.contextmanager
def hanging(address: str, clients: int) -> Iterator[None]:
    """Connect, and send half a request line or nothing."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for index in range(clients):
            channel = stack.enter_context(socket.create_connection((host, int(port))))
            channel.sendall(b"" if index % 2 else b"GET /met")
        yield


@contextlib.contextmanager
def guessing(address: str, clients: int) -> Iterator[None]:
    """Try wrong passwords from another process, as fast as the answers come."""
    process = multiprocessing.get_context("spawn").Process(target=guess, args=(address, clients), daemon=True)
    process.start()
    time.sleep(2)  # until it is at work
    try:
        yield
    finally:
        process.terminate()
        process.join(timeout=10)


def guess(address: str, clients: int) -> None:
    def work(client: int) -> None:
        for number in itertools.count():
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(address, timeout=30)
                connection.request("GET", "/metrics", headers={"Authorization": basic(f"{client} {number}")})
                connection.getresponse().read()
                connection.close()

    for client in range(clients):
        threading.Thread(target=work, args=(client,), daemon=True).start()
    time.sleep(600)


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"benchmark:{password}".encode()).decode()


@contextlib.contextmanager
def serving(runs: int, config: Path | None) -> Iterator[str]:
    """Serve a full board in another process; yields its address."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_board, args=(runs, config, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("end")
        process.join(timeout=10)


def serve_board(runs: int, config: Path | None, channel: Connection) -> None:
    board = Board({"version": "benchmark"})
    for index in range(runs):
        board.add_run(f"run-{index}", {"model": "benchmark", "probe": "random tokens", "mode": "observe"})
        move(board, f"run-{index}", index)
    with serve(
        "127.0.0.1:0", registry_of(board), healthy=lambda: True, ready=lambda: True, web_config=config
    ) as address:
        channel.send(address)
        for turn in itertools.count():
            move(board, f"run-{turn % runs}", turn)
            if channel.poll(1 / runs):
                return


def move(board: Board, run: str, turn: int) -> None:
    """Give every gauge of a run another value, as a judged event and a scan do."""
    for row in METRICS:
        if row.kind == "gauge" and row.layer is None and row.labels == ("run",):
            board.set(run, row.name, 0.1234 * turn)
    board.observe_replay(run, 1.0)


def scrape(address: str, tls: Path | None, count: int) -> list[float]:
    """Return the seconds of each scrape, from connecting to the last byte."""
    context = None if tls is None else ssl.create_default_context(cafile=str(tls.parent / "server.crt"))
    headers = {"Accept-Encoding": "gzip", "Authorization": basic(PASSWORD)}
    times = []
    for index in range(count + 10):
        began = time.perf_counter()
        connection = (
            http.client.HTTPConnection(address, timeout=30)
            if context is None
            else http.client.HTTPSConnection(address, timeout=30, context=context)
        )
        connection.request("GET", "/metrics", headers=headers)
        response = connection.getresponse()
        response.read()
        connection.close()
        assert response.status == 200
        if index >= 10:  # the first ones warm up
            times.append(time.perf_counter() - began)
    return times


def make_web_configs(folder: Path) -> tuple[Path, Path]:
    """Return a configuration with TLS and one with a password (a hash of cost 10)."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    about = ("-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt"))
    subprocess.run(["openssl", "req", "-x509", *key, *about, *files], check=True, capture_output=True)
    tls, password = folder / "tls.yaml", folder / "password.yaml"
    tls.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    password.write_text(f"basic_auth_users: {{benchmark: {hashed}}}\n")
    return tls, password


if __name__ == "__main__":
    main()
