"""What systemd is told, on a real datagram socket, and what signals do in a real process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rksp_monitor import supervisor
from rksp_monitor.supervisor import Notifier, signals


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(10)
        yield bound


def heard(manager: socket.socket) -> list[str]:
    """Return the messages that wait, each a block of lines."""
    said = []
    manager.setblocking(False)
    try:
        while True:
            said.append(manager.recv(4096).decode())
    except BlockingIOError:
        return said


def test_a_life_in_messages(manager: socket.socket):
    notifier = Notifier(manager.getsockname())
    notifier.ready()
    notifier.status("2 runs, 3 waiting")
    notifier.status("2 runs, 3 waiting")
    notifier.watchdog()
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    after = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.extend(2.5)
    notifier.stopping()
    said = heard(manager)
    reloading, moment = said.pop(3).split("\nMONOTONIC_USEC=")
    assert reloading == "RELOADING=1"
    assert before <= int(moment) <= after
    assert said == [
        "READY=1",
        "STATUS=2 runs, 3 waiting",
        "WATCHDOG=1",
        "READY=1",
        "EXTEND_TIMEOUT_USEC=2500000",
        "STOPPING=1",
    ]


def test_a_name_cannot_speak_to_the_manager(manager: socket.socket):
    Notifier(manager.getsockname()).status("run a\nMAINPID=1\n\udcff")
    assert heard(manager) == ["STATUS=run a MAINPID=1 \\udcff"]


def test_the_socket_comes_from_the_environment_and_may_be_abstract(monkeypatch: pytest.MonkeyPatch):
    name = f"rksp-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notifier().ready()
        assert heard(bound) == ["READY=1"]


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "vsock:2:1"])
def test_without_a_manager_nothing_happens(address: str):
    Notifier(address).ready()


def test_a_manager_that_reads_no_more_holds_nobody_up(manager: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "PATIENCE", 0.001)
    notifier = Notifier(manager.getsockname())
    for _ in range(600):  # more than its queue holds; would never end if sending blocked
        notifier.watchdog()
    assert 0 < len(heard(manager)) < 600


@pytest.mark.parametrize(
    ("limit", "of", "interval"),
    [
        ("30000000", None, 15.0),
        ("30000000", "self", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_interval(
    limit: str | None, of: str | None, interval: float | None, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (("WATCHDOG_USEC", limit), ("WATCHDOG_PID", str(os.getpid()) if of == "self" else of)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert Notifier("").watchdog_interval == interval


def test_a_signal_calls_its_handler_in_a_thread_of_its_own():
    called, by = threading.Event(), []

    def handler() -> None:
        by.append(threading.current_thread())
        called.set()

    before = signal.getsignal(signal.SIGHUP)
    with signals({signal.SIGHUP: handler}):
        os.kill(os.getpid(), signal.SIGHUP)
        assert called.wait(10)
    assert by[0] is not threading.main_thread()
    assert signal.getsignal(signal.SIGHUP) is before


HOLDS_THE_LOCK = """
import os, signal, threading
from rksp_monitor.supervisor import signals

stop = threading.Event()
with signals({signal.SIGTERM: stop.set}):
    with stop._cond:  # what the main thread holds inside `stop.wait` and `stop.set`
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
    assert stop.wait(20)
print("ended")
"""


def test_a_signal_while_the_main_thread_holds_the_lock_is_no_deadlock():
    assert subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, timeout=60).stdout == b"ended\n"
