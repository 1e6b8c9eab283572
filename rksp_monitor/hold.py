"""The hold of a run: a person's word over the policy's, in a file beside the ledger that the watcher reads each scan.

    {"schema": "rksp.hold/1", "levers": null, "until": null, "by": "ann", "reason": "maintenance", "since": 1.7e9}

``levers`` null: no orders at all; otherwise what a person ordered. Whoever writes it needs no ledger, and a watcher
that is not running finds it when it starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ControlError
from rksp_core.orders import is_number
from rksp_core.policy import Hold

SCHEMA = "rksp.hold/1"


def hold_file(ledger: Path) -> Path:
    """Return where the hold of a ledger's run lies."""
    return ledger.with_suffix(".hold.json")


def read_hold(path: Path, now: float) -> Hold | None:
    """Return the hold that is in force at ``now`` (seconds since the epoch); None without one, or when it ran out.

    Raises
    ------
    ControlError
        When there is a file that cannot be read as a hold.
    """
    document = _document(path)
    if document is None:
        return None
    try:
        hold = Hold.from_dict(document)
    except ControlError as error:
        raise ControlError(f"{path}: {error}") from error
    return hold if hold.holds(now) else None


def held_since(path: Path) -> float | None:
    """Return when the hold was asked for, in seconds since the epoch; None when nothing says so."""
    since = (_document(path) or {}).get("since")
    return since if is_number(since) else None


def write_hold(path: Path, hold: Hold, since: float) -> None:
    """Put the hold in force from the watcher's next scan on; one that is there is replaced.

    Raises
    ------
    ControlError
        When it cannot be written.
    """
    document = {"schema": SCHEMA, **hold.to_dict(), "since": since}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n", mode=0o600)
        if os.geteuid() == 0:  # the watcher may be another user's, and has to read it
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise ControlError(
            f"the hold {path} cannot be written ({error.strerror}); it must lie in a folder this user may write"
        ) from error


def remove_hold(path: Path) -> bool:
    """End the hold; return whether there was one, damaged or not.

    Raises
    ------
    ControlError
        When it cannot be removed.
    """
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ControlError(f"the hold {path} cannot be removed ({error.strerror}); remove it as its owner") from error
    return True


_WAYS_OUT = "write it again with `rksp control hold`, or end it with `rksp control release`"


def _document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ControlError(f"the hold {path} cannot be read ({error.strerror}); read it as its owner") from error
    except (ValueError, RecursionError) as error:
        raise ControlError(f"{path} is no JSON; {_WAYS_OUT}") from error
    schema = document.get("schema") if isinstance(document, dict) else document
    if not isinstance(document, dict) or schema != SCHEMA:
        raise ControlError(f"a hold has schema {SCHEMA!r}, {path} has {schema!r:.40}; {_WAYS_OUT}")
    return document
