"""How a run goes back to one of its checkpoints in the midst of training, as an order asks it to.

Weights, optimizer, step and labels are those of the checkpoint; what an order set is not, nor how often the run went
back. By default the batches of the stretch that is undone are not seen again (``control.skip_batches``), as Chowdhery
et al. 2022 (PaLM, Sec. 5.1) went on after a spike: the same data need not lead to the same trouble from other weights,
but nothing is lost by taking other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.callbacks import Observer
from training.checkpoint import checkpoints, step_of
from training.run import Run
from training.run_folder import write_rollbacks


def go_back(run: Run, observers: Sequence[Observer], step: int) -> int | None:
    """Go back to the newest checkpoint at or before ``step``; return its step, None where there is none.

    Every process calls this. What was written after that step, lines, profiles and checkpoints, is removed.

    Raises
    ------
    CheckpointError
        When the checkpoint is damaged: the model may be half restored, so the run ends.
    """
    folder = Path(run.config.output) / "checkpoints"
    found = [step_of(path) for path in checkpoints(folder) if step_of(path) <= step]
    (reached,) = run.ranks.from_first([float(found[-1]) if found else -1.0])  # rank 0 writes them
    if reached < 0:
        return None
    with run.ranks.together():
        run.go_back(folder / f"step-{int(reached):08d}")
    for observer in observers:
        observer.back(run)
    with run.ranks.together():
        if run.ranks.first:  # last: a run that is killed before is asked again when it is resumed, and goes back then
            write_rollbacks(run.config, run.rollbacks)
    return run.step
