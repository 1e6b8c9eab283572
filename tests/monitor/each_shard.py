"""Run in two processes by `test_dcp`: writes one sharded model (FSDP2) as its trainers do.

checkpoints/step-00000010    the bundled trainer's way: the model under "model"
checkpoint/step-20           torchtitan's: the model's tensors at the top, written in the background
whole.pt                     the same weights, gathered on rank 0
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.monitor import tiny_model


def main(run: Path, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{run}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny_model.build(width=3)  # 3 rows on 2 processes: shards of unequal size
    model.temperature = nn.Parameter(torch.rand(1))  # and one process without any
    model.register_buffer("counter", torch.tensor(7))  # and a tensor that is not sharded, of no dimension
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8).reshape(2, 4)).square().sum().backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=run / "checkpoints" / "step-00000010")
    trained = {"step": torch.tensor(20), "losses": [1.0, 2.0]}
    content = {**weights, "optimizer": state, "train_state": trained, "dataloader": {"position": 3}}
    dcp.async_save(content, checkpoint_id=run / "checkpoint" / "step-20").result()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, run / "whole.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
