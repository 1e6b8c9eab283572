"""Run under torchrun by `test_stabilizers_processes`: the weights after two steps, as several processes leave them."""

import sys
from pathlib import Path

import torch

from training.config import read_config
from training.ranks import join, leave, whole
from training.run import build_run
from training.step import advance


def weights(run) -> dict[str, torch.Tensor]:
    """Two steps' weights by name, whole where they are sharded, and what the penalties added to the loss."""
    added = [advance(run).auxiliary_loss for _ in range(2)]
    return {name: whole(tensor) for name, tensor in run.model.state_dict().items()} | {"added": torch.tensor(added)}


def main(folder: Path) -> None:
    ranks = join("cpu")
    for path in sorted(folder.glob("*.yaml")):
        found = weights(build_run(read_config(path), ranks))
        if ranks.first:
            torch.save(found, path.with_suffix(".pt"))
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
