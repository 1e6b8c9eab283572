"""What a scrape takes: alone, and beside clients that hang.

    python benchmarks/scrape.py [--runs 50] [--clients 50] [--scrapes 300]

A board of 50 runs, every gauge set, is served by a process of its own; another scrapes it, one request after the other,
as Prometheus does. Half of the hanging clients send half a request line and nothing more, half send nothing at all.
Prints p50 and p99 in milliseconds, and each as a ratio of the same scrapes without clients; over TLS, every client
hangs in the handshake. The target is a p99 under 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rksp_monitor.endpoint import serve  # noqa: E402
from rksp_monitor.metrics import METRICS, Board, registry_of  # noqa: E402

TARGET = 0.050


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("--runs", 50), ("--clients", 50), ("--scrapes", 300)):
        parser.add_argument(name, type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for protocol, config in (("http", None), ("https", make_web_config(Path(folder)))):
            compare(arguments, protocol, config)


def compare(arguments: argparse.Namespace, protocol: str, config: Path | None) -> None:
    with serving(arguments.runs, config) as address:
        size, alone = scrape(address, config, arguments.scrapes)
        with contextlib.ExitStack() as stack:
            for index in range(arguments.clients):
                host, _, port = address.rpartition(":")
                channel = stack.enter_context(socket.create_connection((host, int(port))))
                channel.sendall(b"" if index % 2 else b"GET /met")
            _, beside = scrape(address, config, arguments.scrapes)
    for name, times in (("alone", alone), (f"beside {arguments.clients} hanging", beside)):
        p50, p99 = np.percentile(times, [50, 99])
        r50, r99 = (p50, p99) / np.percentile(alone, [50, 99])
        print(
            f"{protocol:5} {name:18} p50 {p50 * 1e3:6.2f} ms ({r50:4.2f} x)   p99 {p99 * 1e3:6.2f} ms ({r99:4.2f} x)   "
            f"{arguments.runs} runs, {size:,} bytes; target p99 < {TARGET * 1e3:.0f} ms: "
            f"{'met' if p99 < TARGET else 'MISSED'}"
        )


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
        run = f"run-{index}"
        board.add_run(run, {"model": "benchmark", "probe": "random tokens", "mode": "observe"})
        for row in METRICS:
            if row.kind == "gauge" and row.layer is None and row.labels == ("run",):
                board.set(run, row.name, 0.1234 * index)
        board.observe_replay(run, 1.0)
    with serve(
        "127.0.0.1:0", registry_of(board), healthy=lambda: True, ready=lambda: True, web_config=config
    ) as address:
        channel.send(address)
        channel.recv()


def scrape(address: str, config: Path | None, count: int) -> tuple[int, list[float]]:
    """Return the size of the last body in bytes (compressed), and the seconds of each scrape from connect to end."""
    context = None if config is None else ssl.create_default_context(cafile=str(config.parent / "server.crt"))
    times, body = [], b""
    for index in range(count + 10):
        began = time.perf_counter()
        connection = (
            http.client.HTTPConnection(address, timeout=30)
            if context is None
            else http.client.HTTPSConnection(address, timeout=30, context=context)
        )
        connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
        body = connection.getresponse().read()
        connection.close()
        if index >= 10:  # the first ones warm up
            times.append(time.perf_counter() - began)
    return len(body), times


def make_web_config(folder: Path) -> Path:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    about = ("-subj", "/CN=benchmark", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt"))
    subprocess.run(["openssl", "req", "-x509", *key, *about, *files], check=True, capture_output=True)
    config = folder / "web.yaml"
    config.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}\n")
    return config


if __name__ == "__main__":
    main()
