"""Where a command's report goes: to stdout, as wide and coloured as suits it, or to the file that a flag names."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rksp_core.errors import ConfigError
from rksp_monitor.output_file import output_stream


def emit(text: str | Iterable[str], output_file: Path | None, note: str) -> None:
    """Write a report, or its parts as they come, to the file and say so on stderr, or to stdout.

    Raises
    ------
    ConfigError
        When it cannot be written.
    BrokenPipeError
        When the reader of stdout went away.
    """
    parts = [text] if isinstance(text, str) else text
    if output_file is None:
        try:
            sys.stdout.writelines(parts)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ConfigError(f"the report cannot be written to stdout: {error.strerror}") from error
        return
    with output_stream(output_file) as stream:
        stream.writelines(part.encode(errors="replace") for part in parts)
    print(f"rksp: {note} {output_file}", file=sys.stderr)


def terminal(output_file: Path | None) -> dict[str, Any]:
    """Return width and colour of a table: the terminal's own where a person reads it."""
    if output_file is not None or not sys.stdout.isatty():
        return {"width": 120, "colour": False}
    return {"width": shutil.get_terminal_size((120, 24)).columns, "colour": not os.environ.get("NO_COLOR")}
