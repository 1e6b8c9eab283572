"""What becomes of a table or a figure: the paper's figures beside ours, and one honest sentence."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.experiments.intervals import Mean, Share, apart

SCHEMA = "rksp.paper_section/1"
HEADER = ("what", "the paper", "ours", "same sign")


@dataclass(frozen=True)
class Section:
    """One table or figure.

    Attributes
    ----------
    name
        Of its module, such as ``table_03``.
    title
        What it is about.
    setting
        One sentence: at which scale, on what, and how many runs.
    rows
        One string for each of ``header``; `same` and `side` say yes, no or -.
    sentence
        What the figures say, and what they are too few to say; written with `said`.
    header
        Names of the columns.
    figure
        A picture's path from the repository's root, or None.
    """

    name: str
    title: str
    setting: str
    rows: tuple[tuple[str, ...], ...]
    sentence: str
    header: tuple[str, ...] = HEADER
    figure: str | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"{self.name}: the row {row} needs {len(self.header)} cells, one for each of the header"
                )


def same(agree: bool | None) -> str:
    """Return whether an effect has the paper's sign; None: there is nothing to compare, or too little."""
    return "-" if agree is None else "yes" if agree else "no"


def side(theirs: float, their_reference: float, ours: Share | Mean, reference: Share | Mean) -> str:
    """Return whether ours lies on the paper's side of a reference, and whether that is within chance (p >= .05).

    A dash where the paper has no side, or ours are equal or not known.
    """
    if (
        theirs == their_reference
        or ours.value == reference.value
        or math.isnan(ours.value)
        or math.isnan(reference.value)
    ):
        return same(None)
    agree = same((ours.value > reference.value) == (theirs > their_reference))
    return agree if apart(ours, reference) else f"{agree} (within chance)"


def said(sentence: str, *claims: bool) -> str:
    """Return a sentence that was written by hand, as long as all that it claims holds.

    Raises
    ------
    ConfigError
        When the figures changed and the sentence did not.
    """
    if not all(claims):
        places = ", ".join(str(place) for place, claim in enumerate(claims, start=1) if not claim)
        raise ConfigError(
            f"claim {places} of {len(claims)} no longer holds: rewrite {sentence!r} in the table's module"
        )
    return sentence


def write_section(path: Path, section: Section) -> None:
    """Keep a result as JSON."""
    text = json.dumps({"schema": SCHEMA, **asdict(section)}, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text + "\n")


def read_section(path: Path) -> Section:
    """Read a kept result.

    Raises
    ------
    ConfigError
        When the file cannot be read or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema", None) != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        rows = tuple(tuple(row) for row in document.pop("rows"))
        return Section(rows=rows, header=tuple(document.pop("header")), **document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the result {path} ({error}); compute it again") from error
