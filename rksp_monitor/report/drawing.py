"""Tables without lines, drawn as text at least as wide as the widest of them needs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(columns: Iterable[tuple[str, bool]]) -> Table:
    """Return an empty table of these columns: heading, and whether its cells stand to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in columns:
        made.add_column(heading, justify="right" if right else "left", no_wrap=True)
    return made


def draw(parts: Sequence[Table | Text], widest: Table, width: int, colour: bool) -> str:
    """Return the parts as plain or coloured text."""
    needed = Console(file=io.StringIO(), width=1000).measure(widest).maximum
    stream = io.StringIO()
    console = Console(
        file=stream, width=max(width, needed), force_terminal=colour, no_color=not colour, highlight=False
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
