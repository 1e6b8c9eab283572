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
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"{where} must be one of {', '.join(sorted(known))}, got {name!r}{hint}")


def unknown_key(section: str, key: object, known: Collection[str]) -> str:
    """Return a sentence about a key that ``section`` (such as ``optimizer``; empty: the top) does not have."""
    prefix = f"{section}." if section else ""
    near = nearest(key, known)
    hint = f"did you mean '{prefix}{near}'?" if near else f"known are {', '.join(known)}"
    return f"unknown key '{prefix}{key}'; {hint}"


def nearest(name: object, known: Collection[str]) -> str | None:
    """Return the known name that looks most like ``name``, whatever its case, or None when none does."""
    folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    return folded[near[0]] if near else None
