"""Run under torchrun by `test_ranks`: each run once whole, once in two parts, and one that a single process began."""

import sys
from pathlib import Path

from training.config import read_config
from training.loop import train
from training.ranks import join, leave


def main(folder: Path) -> None:
    ranks = join("cpu")
    for whole in sorted(folder.glob("*-whole.yaml")):
        train(read_config(whole), ranks)
        parts = read_config(whole.with_name(whole.name.replace("whole", "parts")))
        train(parts, ranks, until=6)
        train(parts, ranks, resume=True)
    train(read_config(folder / "begun-alone.yaml"), ranks, resume=True)
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
