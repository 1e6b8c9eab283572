"""Tables without lines, drawn as text at least as wide as the widest of them needs, and what to leave out of one."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rksp_monitor.report.columns import MISSING

GAP = 2  # spaces between two columns


def table(columns: Iterable[tuple[str, bool]]) -> Table:
    """Return an empty table of these columns: heading, and whether its cells stand to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in columns:
        made.add_column(heading, justify="right" if right else "left", no_wrap=True)
    return made


def fitting(headings: Sequence[str], ranks: Sequence[int], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns are shown in so many letters.

    Those that hold nothing go first, then those of the highest rank; those of rank 0 stay, however wide.
    """
    columns = [(heading, *(row[index] for row in rows)) for index, heading in enumerate(headings)]
    widths = [max(map(cell_len, column)) for column in columns]
    hollow = [all(cell == MISSING for cell in column[1:]) for column in columns]
    shown = list(range(len(columns)))
    for index in sorted(shown, key=lambda index: (hollow[index], ranks[index]), reverse=True):
        if sum(widths[kept] + GAP for kept in shown) - GAP > width and ranks[index]:
            shown.remove(index)
    return shown


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
