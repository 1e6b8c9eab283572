"""How a run goes back to one of its checkpoints in the midst of training, as an order asks it to.

Weights, optimizer, step and labels are those of the checkpoint; what an order set is not, nor how often the run went
back. By default the batches of the stretch that is undone are not seen again (``control.skip_batches``), as Chowdhery
et al. 2022 (PaLM, Sec. 5.1) went on after a spike: the same data need not lead to the same trouble from other weights,
but nothing is lost by taking other data.

Checkpoints of later steps are set aside (``checkpoints/undone-1``, ``undone-2``, ...), where neither the run nor a
watcher takes them for its own: who may write orders shall not be able to delete what was made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rksp_core.errors import CheckpointError
from training.callbacks import Observer
from training.checkpoint import checkpoints, step_of
from training.run import Run
from training.run_folder import write_rollbacks

_log = logging.getLogger(__name__)


def go_back(run: Run, observers: Sequence[Observer], step: int) -> int | None:
    """Go back to the newest checkpoint at or before ``step`` that can be read; return its step, None where none is.

    Every process calls this. Of what was written after that step, lines and profiles are removed, and checkpoints are
    set aside.

    Raises
    ------
    CheckpointError
        When all of these checkpoints are damaged: the model may be half restored, so the run ends.
    """
    if not _restore(run, Path(run.config.output) / "checkpoints", step):
        return None
    for observer in observers:
        observer.back(run)
    with run.ranks.together():
        if run.ranks.first:  # last: a run that is killed before is asked again when it is resumed, and goes back then
            write_rollbacks(run.config, run.rollbacks)
    return run.step


def _restore(run: Run, folder: Path, step: int) -> bool:
    """Bring the run to the newest checkpoint at or before ``step`` that can be read; False where there is none."""
    before, damaged = (run.step, run.labels, list(run.rollbacks)), None
    while True:
        found = [step_of(path) for path in checkpoints(folder) if step_of(path) <= step]
        (tried,) = run.ranks.from_first([float(found[-1]) if found else -1.0])  # rank 0 writes them
        with run.ranks.together():
            if tried < 0 and damaged is not None:
                raise damaged
        if tried < 0:
            return False
        damaged = None
        with run.ranks.together():
            try:
                run.go_back(folder / f"step-{int(tried):08d}")
            except CheckpointError as error:
                damaged = error
        if run.ranks.sum([damaged is not None]) == [0.0]:
            return True
        if damaged is not None:
            _log.warning("step %d: %s; going back further", before[0], damaged)
        run.step, run.labels, run.rollbacks = before[0], before[1], list(before[2])
        step = int(tried) - 1
