"""What the commands of the trainer share: whatever goes wrong is one sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rksp_core.errors import RkspError

INTERRUPTED = 130  # by Ctrl-C
ANEW = "the same command begins anew"


def carried_out(name: str, work: Callable[[], int | None], interrupted: str = "the same command goes on") -> int:
    """Do the work of the command called ``name`` and return its exit code, 0 where the work returns none.

    A mistake is one sentence on stderr and the error's own code; Ctrl-C says how to go on.
    """
    try:
        return work() or 0
    except RkspError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
