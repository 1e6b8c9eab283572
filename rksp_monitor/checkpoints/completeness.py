"""The answer to "can it be read yet?": a value, since waiting for a writer is the usual case and no error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rksp_core.errors import IncompleteCheckpoint


@dataclass(frozen=True)
class Completeness:
    """True when a checkpoint can be read; otherwise ``problem`` says in one sentence what is missing."""

    problem: str = ""

    def __bool__(self) -> bool:
        return not self.problem


def answers(check: Callable[[Path], None]) -> Callable[[Path], Completeness]:
    """Turn a check that raises IncompleteCheckpoint into one that returns it; other errors stay errors."""

    @functools.wraps(check)
    def is_complete(path: Path) -> Completeness:
        try:
            check(path)
        except IncompleteCheckpoint as error:
            return Completeness(str(error))
        return Completeness()

    return is_complete
