"""What a scan costs that finds nothing new, beside a plain listing of the same folder.

    python benchmarks/scan_cost.py [FOLDER]

Fills ``profiles/`` of a run (in FOLDER, or the temporary folder) with 100, 1000 and 20 000 profiles, as months of
training leave them, and prints the best of 20 scans of files that are all known, of 20 plain listings, of a scan that
finds one new file among them, and of a look at each file (a stat), which a scan avoids. The best, as other processes
only ever add time. The target is 50 ms at 20 000 files: a fortieth of the time between two scans.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rksp_monitor.discovery import Scanner  # noqa: E402
from tests.core.profiles import profile  # noqa: E402

TARGET = 0.05


def main() -> None:
    above = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    names = ("first scan", "scan", "one is new", "listing", "a stat each")
    widths = (14, 12, 14, 12, 14)
    print("  files" + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True)) + f"{'scan / listing':>17}")
    for count in (100, 1000, 20_000):
        with tempfile.TemporaryDirectory(dir=above) as run:
            scan = measure(Path(run), count)
    print(f"target: under {TARGET * 1e3:.0f} ms at 20 000 files: {'met' if scan < TARGET else 'MISSED'}")


def measure(run: Path, count: int) -> float:
    """Print one row; return the seconds of a scan."""
    folder = run / "profiles"
    folder.mkdir()
    text = json.dumps(profile(step=1).to_dict())
    paths = [folder / f"step-{step:08d}.json" for step in range(count)]
    for path in paths:
        path.write_text(text)
    scanner = Scanner(run)
    first = best(scanner.scan, times=1)
    assert len(scanner.scan()) == count
    scan = best(scanner.scan)
    listing = best(lambda: os.listdir(folder))  # noqa: PTH208 - the plainest there is
    stats = best(lambda: [path.stat() for path in paths], times=3)
    new = min(scan_with_one_more(scanner, folder / f"step-{count + n:08d}.json", text) for n in range(5))
    row = (first, scan, new, listing, stats)
    widths = (11, 9, 11, 9, 11)
    cells = "".join(f"{seconds * 1e3:{width}.2f} ms" for seconds, width in zip(row, widths, strict=True))
    print(f"{count:>7}{cells}{scan / listing:>17.1f}")
    return scan


def scan_with_one_more(scanner: Scanner, path: Path, text: str) -> float:
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(text)
    hidden.rename(path)
    return best(scanner.scan, times=1)


def best(call: Callable[[], object], times: int = 20) -> float:
    """Return the seconds of the fastest call."""
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return min(durations)


if __name__ == "__main__":
    main()
