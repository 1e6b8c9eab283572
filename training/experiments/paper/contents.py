"""Which tables and figures there are, and where their runs and results lie."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol

from rksp_core.errors import ConfigError
from training.experiments import paper
from training.experiments.paper.section import Section
from training.experiments.record import PACKED
from training.names import choose

ROOT = Path(__file__).parents[3]
SPECS = ROOT / "training" / "experiments" / "specs" / "paper"
DATA = ROOT / "benchmarks" / "data" / "paper"


class Chapter(Protocol):
    """The module of a table or figure."""

    TITLE: str
    CHEAP: bool
    SPECS: tuple[str, ...]

    def section(self) -> Section:
        """Compute the table, or draw the figure."""
        ...


def names() -> tuple[str, ...]:
    """Return the names of all tables, then of all figures."""
    found = sorted(module.name for module in pkgutil.iter_modules(paper.__path__))
    return tuple(name for kind in ("table_", "figure_") for name in found if name.startswith(kind))


def chapter(name: str) -> Chapter:
    """Return the module of a table or figure.

    Raises
    ------
    ConfigError
        When there is none of that name.
    """
    return importlib.import_module(f"{paper.__name__}.{choose(name, names(), 'NAME')}")  # type: ignore[return-value]


def result_of(name: str) -> Path:
    """Return where the result of a table or figure is kept."""
    return DATA / f"{name}.json"


def records_of(spec: str) -> Path:
    """Return where the records of a sweep are kept."""
    return DATA / spec / PACKED


def missing(name: str) -> list[str]:
    """Return the sweeps that a table or figure reads and that have no records yet."""
    return [spec for spec in chapter(name).SPECS if not records_of(spec).exists()]


def command(name: str) -> str:
    """Return what computes a table or figure, and makes those of its runs that are left."""
    return f"python -m training.experiments.paper {name}{' --run' if chapter(name).SPECS else ''}"


def spec_of(spec: str) -> Path:
    """Return the spec of a sweep.

    Raises
    ------
    ConfigError
        When there is none.
    """
    path = SPECS / f"{spec}.yaml"
    if not path.exists():
        raise ConfigError(f"there is no sweep {path}; name one of {SPECS}")
    return path
