"""Put a real text into a folder: ``python scripts/real_data.py [FOLDER]``, FOLDER being ``data`` unless given.

    kjv.txt    the King James Bible, 4.3 MB, from Debian's packages bible-kjv and bible-kjv-text

What is there already is kept. The packages come with ``scripts/real_parts.sh``, and so does Fashion-MNIST
(dataset-fashion-mnist), which the trainer reads where it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Write the text, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data"))
    target = parser.parse_args().folder / "kjv.txt"
    if target.exists():
        print(f"{target} is there")  # noqa: T201
        return 0
    program = shutil.which("bible")
    if program is None:
        print("real_data: no program `bible`; scripts/real_parts.sh installs it", file=sys.stderr)  # noqa: T201
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_suffix(".tmp")
    with half.open("wb") as stream:
        lines = os.environ | {"COLUMNS": "80"}  # the program fills lines to this width
        subprocess.run([program, "Gen1:1-Rev22:21"], stdout=stream, env=lines, check=True)  # noqa: S603 - fixed
    half.rename(target)
    print(f"{target} was made")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
