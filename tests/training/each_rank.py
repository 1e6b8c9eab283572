"""Run under torchrun by `test_processes`: trains step by step and notes what this process saw.

Rank 0 plays the monitor too: it writes an order while the run is under way.
"""

import hashlib
import json
import sys
from pathlib import Path

from rksp_core.control import ControlWriter
from rksp_core.orders import KSSSettings, Reason
from training.callbacks import Control
from training.config import read_config
from training.loop import advance
from training.ranks import join, leave
from training.run import build_run

ORDER_AFTER = 7


def main(path: Path, notes: Path) -> None:
    config = read_config(path)
    ranks = join("cpu")
    run = build_run(config, ranks)
    folder = config.control_folder
    control = Control(config, ranks, run.regularizer, lambda _: None)
    weights = []
    while run.step < config.steps:
        control.obey(run.step, stop=False)
        weights.append(advance(run).kss_weight)
        if ranks.first and run.step == ORDER_AFTER:
            ControlWriter(folder).issue(config.run_id, KSSSettings(alpha=0.25, interval=2), Reason())
    digest = hashlib.sha256()
    for parameter in run.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    note = {"weights": weights, "parameters": digest.hexdigest()}
    (notes / f"rank-{ranks.rank}.json").write_text(json.dumps(note))
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
