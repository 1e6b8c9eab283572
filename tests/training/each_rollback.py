"""Run under torchrun by `test_ranks`: every run of the folder is interrupted at step 6 and ordered back to step 4."""

import sys
from pathlib import Path

from rksp_core.control import ControlWriter
from rksp_core.orders import KSSSettings, Reason
from training.config import read_config
from training.loop import train
from training.ranks import join, leave


def main(folder: Path) -> None:
    ranks = join("cpu")
    for path in sorted(folder.glob("*.yaml")):
        config = read_config(path)
        train(config, ranks, until=6)
        with ranks.together():
            if ranks.first:
                writer = ControlWriter(config.control_folder)
                writer.issue(config.run_id, KSSSettings(), Reason(), learning_rate_scale=0.5, rollback_to=5)
        train(config, ranks, resume=True)
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
