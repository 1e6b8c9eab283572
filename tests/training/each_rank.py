"""Run under torchrun by `test_ranks`: trains step by step and notes what this process saw.

Rank 0 plays the monitor too: it writes an order between two micro-batches of a step.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from rksp_core.control import ControlWriter
from rksp_core.orders import KSSSettings, Reason
from training.config import read_config
from training.loop import obey
from training.ranks import join, leave
from training.run import build_run
from training.step import advance

ORDERED_IN_STEP = 8


def main(path: Path, notes: Path) -> None:
    config = read_config(path)
    ranks = join("cpu")
    run = build_run(config, ranks)
    passes, records = [], []

    def order(*_: object) -> None:
        passes.append(run.step + 1)
        if ranks.first and passes.count(ORDERED_IN_STEP) == 2 and passes[-1] == ORDERED_IN_STEP:
            kss = KSSSettings(alpha=0.25, interval=2, variant="hinge")
            beside = {"clip": 0.5, "learning_rate_scale": 0.1, "surprise": 0.5}
            ControlWriter(config.control_folder).issue(config.run_id, kss, Reason(), **beside)

    run.model.register_forward_pre_hook(order)
    while run.step < config.steps:
        obey(run, stop=False, say=lambda _: None)
        records.append(advance(run))
    assert passes.count(ORDERED_IN_STEP) == config.accumulation == 4
    digest = hashlib.sha256()
    for parameter in run.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    note = {
        "weights": [record.kss_weight for record in records],
        "rates": [record.learning_rate for record in records],
        "clip": run.follower.levers.clip,
        "surprise": run.follower.levers.surprise,
        "variant": run.regularizer.settings.variant,
        "parameters": digest.hexdigest(),
    }
    if ranks.first:
        time.sleep(0.2)  # the others are done by now, and must not leave before this one
    (notes / f"rank-{ranks.rank}.json").write_text(json.dumps(note))
    leave(ranks)
    assert len(list(notes.glob("rank-*.json"))) == ranks.size


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
