"""Run by `test_processes`: one process, then two, train on the same global batches; orders come in between."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import TrainerCallback

from rksp_core import ControlFollower, KSSRegularizer, KSSSettings, Limits
from rksp_core.control import ControlWriter
from rksp_core.integrations.huggingface import RkspCallback
from rksp_core.orders import Levers, Reason
from tests.integrations.test_huggingface import arguments, figures, train
from tests.integrations.words import Words, weights

WHOLE = 8  # rows of one optimizer step, in two micro-batches
ORDER = KSSSettings(alpha=4.0, interval=1, layer_fraction=0.7)


class MiddleOfStep(TrainerCallback):
    """Rank 0 plays the monitor after the first micro-batch of the third step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2 and state.is_world_process_zero:
            writer = ControlWriter(Path(args.output_dir) / "control")
            writer.issue("run", ORDER, Reason(), clip=0.5, learning_rate_scale=0.5)


def main(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    early = ControlFollower(folder / "early", "run", KSSRegularizer(Words()))  # before the processes know each other
    size = WHOLE // 2 // processes
    args = arguments(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        max_steps=6,
        max_grad_norm=1.0,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
    )
    model = Words()
    limits = Limits(clip=(0.1, 1.0), learning_rate_scale=(0.1, 1.0))
    trainer = train(model, args, MiddleOfStep(), RkspCallback(folder, run_id="run", limits=limits), count=48)
    rank = dist.get_rank() if processes > 1 else 0
    if rank == 0:
        ControlWriter(folder / "early").issue("run", ORDER, Reason())
    if processes > 1:
        dist.barrier()
    obeyed = early.follow(0) == Levers.of(ORDER, None, None)
    terms = {"weights": figures(trainer, "kss_weight"), "terms": figures(trainer, "kss_term")} if rank == 0 else {}
    note = {**terms, "model": weights(model).tolist(), "obeyed": obeyed, "answered": early.order is not None}
    (folder / f"rank-{rank}.json").write_text(json.dumps(note))


def rank(number: int, folder: Path, processes: int, port: int) -> None:
    """What torchrun tells a process; forking them saves each the seconds of its imports."""
    here = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "MASTER_PORT": port}
    if processes > 1:
        os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    main(folder, processes)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, processes in (("one", 1), ("two", 2)):
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        start_processes(rank, (folder, processes, port), nprocs=processes, start_method="fork")
