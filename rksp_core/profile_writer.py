"""Compact profiles from inside a run: the trainer writes them, the watcher treats each as an event of the run.

Checkpoints are often 500-5000 steps apart, too far for early warning; a profile of a fixed probe costs one forward
pass and some linear algebra, so a trainer can afford one every few steps.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import SupportsFloat

from rksp_core.profile import ModelProfile, finite_or_none

FOLDER = "profiles"


class ProfileWriter:
    """Writes ``<run>/profiles/step-00000010.json``, each file atomically.

    Parameters
    ----------
    run_folder
        The folder of the run; ``profiles/`` is created below it.
    every
        Steps between two profiles; 0 writes none.
    """

    def __init__(self, run_folder: str | os.PathLike[str], *, every: int) -> None:
        self.folder = Path(run_folder) / FOLDER
        self.every = every
        if every > 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def due(self, step: int) -> bool:
        """Whether a profile is wanted at this step."""
        return self.every > 0 and step % self.every == 0

    def write(
        self,
        profile: ModelProfile,
        step: int,
        *,
        loss: SupportsFloat | None = None,
        gradient_norm: SupportsFloat | None = None,
    ) -> Path:
        """Write one profile with the trainer's own figures beside it, and return its path.

        ``loss`` and ``gradient_norm`` (before clipping) may be None, not known, or not finite: then they are stored as
        None, too, and named in ``not_finite``.
        """
        given = {"loss": loss, "gradient_norm": gradient_norm}
        figures = {name: None if value is None else _number(value) for name, value in given.items()}
        stamped = dataclasses.replace(
            profile,
            step=step,
            loss=finite_or_none(figures["loss"]),
            gradient_norm=finite_or_none(figures["gradient_norm"]),
            not_finite=tuple(name for name, value in figures.items() if value is not None and not math.isfinite(value)),
        )
        path = self.folder / f"step-{step:08d}.json"
        stamped.save(path, eigenvalues=False)
        return path


def _number(value: SupportsFloat) -> float:
    """Return a number that a training loop may hold as a tensor, with its graph or on a GPU."""
    detach = getattr(value, "detach", None)
    return float(value if detach is None else detach())
