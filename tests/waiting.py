"""Waiting for what real processes do."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable


def until(what: Callable[[], object], seconds: float = 60, why: str = "it") -> None:
    """Wait for something to become true; the limit only ends a test that would fail anyway."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, sqlite3.Error):
            if what():
                return
        time.sleep(0.05)
    raise AssertionError(f"{why} did not happen in {seconds:g} s")
