"""Real processes in tests: run one, keep one running, wait for it; and what to do where a real part is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])


def need(*programs: str) -> None:
    """Skip the test where a real part is missing; with CI set, fail: there everything is installed."""
    missing = [name for name in programs if shutil.which(name, path=PATH) is None]
    if missing:
        message = f"{', '.join(missing)} not found; scripts/real_parts.sh installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@contextlib.contextmanager
def daemon(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the length of the block; its output goes into ``log``."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """Return what a command writes; fails with its errors when it fails."""
    done = subprocess.run(
        command, env=environment or os.environ | {"PATH": PATH}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_until(holds: Callable[[], bool], seconds: float, message: str) -> None:
    """Poll until ``holds()``, or fail with the message."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, message
        time.sleep(0.1)


def free_port() -> int:
    """Return a port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
