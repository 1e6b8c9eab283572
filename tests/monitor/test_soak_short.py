"""The short form of every experiment of `tests.soak`: real processes, few tries, no time asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import EXPERIMENTS
from tests.soak.report import Report


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_promise_is_kept(name: str, tmp_path: Path):
    report = Report(name)
    EXPERIMENTS[name](report, tmp_path, short=True)
    assert not report.broken, "\n".join(report.broken)
