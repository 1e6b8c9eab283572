"""docs/paper.md, from the results that are kept: the same results give the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

from training.experiments.paper.contents import ROOT, chapter, command, names, result_of
from training.experiments.paper.section import Section, read_section

BEGINNING = """\
# The paper, run again

Every table and figure of Kim et al. 2026 ([arXiv:2602.22988](https://arxiv.org/abs/2602.22988)) beside what this
repository measures, at the scale of two processor cores: small models, few runs. Shares come with their 95 % Wilson
interval, means with their 95 % t interval, AUROCs with that of 1000 bootstrap resamples. *Same sign* says whether an
effect points the way it does in the paper, and nothing about its size; a dash: nothing to compare, or too little. A run
diverged when its loss was above 50 or not finite, or its gradient norm above 500 on five steps in a row (the paper: on
one). `make paper` computes what is cheap and writes this page; the command under a table computes that one.
"""


def page(folder: Path) -> str:
    """Return the page as Markdown; ``folder`` is the one that it will lie in."""
    return "\n".join([BEGINNING, *(_chapter(name, folder) for name in names())])


def _chapter(name: str, folder: Path) -> str:
    heading = f"## {name.replace('_0', '_').replace('_', ' ').capitalize()}: {chapter(name).TITLE}\n\n"
    if not result_of(name).exists():
        return f"{heading}Not run yet: `{command(name)}`\n"
    return heading + markdown(read_section(result_of(name)), folder) + f"\n`{command(name)}`\n"


def markdown(section: Section, folder: Path) -> str:
    """Return a section without its heading."""
    lines = [section.setting, "", _row(section.header), _row(["---"] * len(section.header)), *map(_row, section.rows)]
    if section.figure is not None:
        lines += [
            "",
            f"![{section.title}]({Path(os.path.relpath(ROOT / section.figure, folder.resolve())).as_posix()})",
        ]
    return "\n".join([*lines, "", section.sentence, ""])


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"
