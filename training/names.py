"""Unknown names, answered with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from rksp_core.errors import ConfigError


def choose(name: object, known: Collection[str], where: str) -> str:
    """Return ``name`` when it is one of ``known``.

    Raises
    ------
    ConfigError
        Otherwise; the message names the nearest known one, and all of them.
    """
    if isinstance(name, str) and name in known:
        return name
    raise ConfigError(f"{where} must be one of {', '.join(sorted(known))}, got {name!r}{suggestion(name, known)}")


def suggestion(name: object, known: Collection[str]) -> str:
    """Return '; did you mean ...?', or nothing when no known name is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
