"""One owner at a time: a lock that ends with its process, and in a file beside it who that is, for whoever is refused.

Of a ledger it is ``NAME.lock`` and ``NAME.owner``, of the orders in a control folder ``watcher.lock`` and
``watcher.owner``. A process that is killed leaves both files and no lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import filelock

from rksp_core.atomic import write_atomic


class Owned(Exception):  # noqa: N818 - an outcome, which the caller turns into an error
    """Somebody else is the owner; the text says who."""


@contextlib.contextmanager
def owned(path: Path, *, mode: int = 0o644) -> Iterator[None]:
    """Be the owner of what ``path`` names. ``mode`` are the permission bits of the lock: who may ever be its owner.

    Raises
    ------
    Owned
        When another one is, in this process or elsewhere.
    OSError
        When the files cannot be written, or their file system has no locks.
    """
    owner = path.with_suffix(".owner")
    # Where there are no locks (Lustre without ``flock``), the library's other kind would outlive a killed process.
    lock = filelock.FileLock(path.with_suffix(".lock"), mode=mode, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise Owned(owner_of(path)[0] or "another process") from error
    except PermissionError as error:  # another user made it: whether it is held, its owner's process says
        who, alive = owner_of(path)
        if alive:
            raise Owned(who) from error
        raise
    try:
        with contextlib.suppress(OSError):  # a courtesy
            write_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}\n", mode=0o644)
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        lock.release()


def owner_of(path: Path) -> tuple[str, bool | None]:
    """Return who says to be the owner, and whether that process lives; "" for nobody, None where it is on another host.

    Nothing is locked for it, and nothing written.
    """
    try:
        owner = path.with_suffix(".owner").read_text(encoding="utf-8").strip()
    except OSError:
        return "", False
    words = owner.split()  # process PID on HOST
    if len(words) < 4 or not words[1].isdecimal() or words[3] != socket.gethostname():
        return owner, None
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return owner, False
    except OSError:  # it is another user's
        pass
    return owner, True
