"""Runs whose outcome is known, as files: one JSON document a line, of schema "rksp.outcome/1".

    {"schema": "rksp.outcome/1", "name": "run 17", "launch": {...}, "diverged": true, "horizon": 20000}

``launch`` is ``risk.launch`` of the run's preflight report (`rksp_core.launch.Launch`), ``horizon`` the steps within
which it diverged or did not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rksp_core.errors import ConfigError
from rksp_core.launch import Launch

SCHEMA = "rksp.outcome/1"


@dataclass(frozen=True)
class Outcome:
    """A run whose outcome is known: how it was launched, and whether it diverged within ``horizon`` steps."""

    name: str
    launch: Launch
    diverged: bool
    horizon: int

    def to_dict(self) -> dict[str, Any]:
        """Return the document of one line."""
        about = {"schema": SCHEMA, "name": self.name, "diverged": self.diverged, "horizon": self.horizon}
        return {**about, "launch": self.launch.to_dict()}


def read_outcomes(paths: Iterable[Path]) -> list[Outcome]:
    """Read the outcomes of several files.

    Raises
    ------
    ConfigError
        When a file cannot be read, a line is none of that schema, or a name comes twice.
    """
    found: dict[str, Outcome] = {}
    for path in paths:
        for place, outcome in _of_file(path):
            if outcome.name in found:
                raise ConfigError(f"{place}: the run {outcome.name!r} comes twice; a run counts once")
            found[outcome.name] = outcome
    return list(found.values())


def _of_file(path: Path) -> Iterator[tuple[str, Outcome]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the outcomes {path} ({reason}); name a file of one outcome a line") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, _of_line(json.loads(line))
            except (ValueError, KeyError, TypeError, ConfigError) as error:
                raise ConfigError(f"{place} holds no outcome of a run ({_said(error)})") from error


def _of_line(document: Any) -> Outcome:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigError(
            f"expected a document of schema {SCHEMA!r}, made of a preflight report and what became of the run"
        )
    name, diverged, horizon = document["name"], document["diverged"], document["horizon"]
    if not isinstance(name, str):
        raise ConfigError(f"name is a text, got {name!r}")
    if not isinstance(diverged, bool):
        raise ConfigError(f"diverged is true or false, got {diverged!r}")
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ConfigError(f"horizon is a count of steps, got {horizon!r}")
    if document["launch"] is None:
        raise ConfigError("its launch is null: the report comes from a preflight without --lr, or without a look-ahead")
    launch = Launch.from_dict(document["launch"])
    launch.features()  # whatever cannot be used is refused here, where its line is known
    return Outcome(name, launch, diverged, horizon)


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
