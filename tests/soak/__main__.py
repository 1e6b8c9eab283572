"""``python -m tests.soak [NAME...] [--short]``: run the experiments named, or all; exit 1 when a promise is broken."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.soak import EXPERIMENTS
from tests.soak.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Try what the watcher promises.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--short", action="store_true", help="the small number of tries that the test-suite makes")
    parser.add_argument("--keep", type=Path, help="work, and leave everything, in this folder")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="where curves go; default runs/soak")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    broken = 0
    for name in arguments.names or EXPERIMENTS:
        report, began = Report(name, arguments.output), time.monotonic()
        if arguments.keep is None:
            with tempfile.TemporaryDirectory(prefix="rksp-soak-") as folder:
                EXPERIMENTS[name](report, Path(folder), short=arguments.short)
        else:
            folder = arguments.keep / name
            folder.mkdir(parents=True)
            EXPERIMENTS[name](report, folder, short=arguments.short)
        report.figure("seconds that the experiment took", f"{time.monotonic() - began:.0f}")
        broken += len(report.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
