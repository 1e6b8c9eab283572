"""Run under torchrun by `test_ranks`: the gradient of one step, as each way to share the work leaves it."""

import sys
from pathlib import Path

import torch

from training.config import read_config
from training.ranks import join, leave, whole
from training.run import build_run
from training.step import advance


def gradients(run) -> dict[str, torch.Tensor]:
    """One step's gradient by parameter name, whole where the parameters are sharded."""
    record = advance(run)
    found = {name: whole(parameter.grad) for name, parameter in run.model.named_parameters()}
    return found | {"term": torch.tensor(record.kss_term), "loss": torch.tensor(record.loss)}


def main(path: Path, notes: Path) -> None:
    ranks = join("cpu")
    for strategy in ("ddp", "fsdp"):
        found = gradients(build_run(read_config(path, [f"parallel={strategy}"]), ranks))
        if ranks.first:
            torch.save(found, notes / f"{strategy}.pt")
    leave(ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
