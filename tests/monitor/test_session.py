"""The process of the watcher, beside what real ones show (`test_watch_e2e`, `test_many_runs_e2e`)."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from rksp_monitor.config import RunEntry, WatchSettings
from rksp_monitor.session import Session


def test_a_run_that_hangs_while_its_series_begin_or_end_ends_nobody(capfd: pytest.CaptureFixture[str]):
    """They do in its own thread: it has a name, and the session looks at it in between."""
    settings = WatchSettings(runs=(RunEntry(folder="run"),))
    session = Session(settings, serve=False, port_file=None, read=lambda: settings)
    hanging = SimpleNamespace(folder=Path("run"), alive=True, heartbeat=-math.inf, name="run")
    session._look_for_hanging([hanging])
    assert "no sign of life" in capfd.readouterr().err
