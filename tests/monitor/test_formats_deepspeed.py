"""DeepSpeed's folders, laid out by hand as `deepspeed` 0.15 to 0.18 write them (it needs a compiler to install).

The layout of a flat vector at stage 3 is that of `deepspeed/utils/zero_to_fp32.py`: rank r holds the r-th part of
``ceil(n / ranks)`` elements of each parameter, in the order of ``param_shapes``.
"""

from __future__ import annotations

import math
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from rksp_core.errors import CorruptCheckpoint, UnsupportedCheckpoint
from rksp_monitor.checkpoints import FORMATS, format_of, read_weights, step_of
from rksp_monitor.weights import load_into
from tests.monitor import tiny_model

WEIGHTS = tiny_model.weights(1)
LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler"


class _LossScaler:
    __module__ = LOSS_SCALER
    __qualname__ = "LossScaler"

    def __init__(self) -> None:
        self.cur_scale = 1.0


def write(run: Path, stage: int, ranks: int, groups: int = 1) -> Path:
    """Write global_step500/ with objects of a class that the watcher does not have."""
    folder = run / "global_step500"
    folder.mkdir(parents=True)
    module = types.ModuleType(LOSS_SCALER)
    module.LossScaler = _LossScaler
    parents = [LOSS_SCALER.rsplit(".", n)[0] for n in range(1, 4)]
    sys.modules |= {name: types.ModuleType(name) for name in parents} | {LOSS_SCALER: module}
    try:
        _write(folder, stage, ranks, groups)
    finally:
        for name in [*parents, LOSS_SCALER]:
            del sys.modules[name]
    return folder


def _write(folder: Path, stage: int, ranks: int, groups: int) -> None:
    names = list(WEIGHTS)
    parts = [names[at::groups] for at in range(groups)]  # parameter groups, as with and without weight decay
    counter = {"counter": torch.tensor([3.0])}
    content = {
        "module": {**WEIGHTS, **counter} if stage < 3 else {**{key: torch.empty(0) for key in names}, **counter},
        "buffer_names": ["counter"],
        "param_shapes": [OrderedDict((key, WEIGHTS[key].shape) for key in part) for part in parts],
        "shared_params": {"head.weight": "embedding.weight"},
        "frozen_param_shapes": None,
        "lr_scheduler": None,
        "global_steps": 500,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}} if stage else {},
        "ds_version": "0.18.0",
        "args": _LossScaler(),
    }
    if stage < 3:
        torch.save(content, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks if stage else 0):
        if stage == 3:
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [torch.cat([_part(WEIGHTS[key], rank, ranks) for key in part]) for part in parts]
        state = {"zero_stage": stage, "partition_count": ranks, "loss_scaler": _LossScaler()}
        state |= {"fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups": flat}
        name = f"{'bf16_' if stage < 3 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.18.0"}, folder / name)


def _part(value: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    size = math.ceil(value.numel() / ranks)
    padded = torch.cat([value.flatten(), torch.full((size * ranks - value.numel(),), math.nan)])
    return padded[rank * size : (rank + 1) * size].clone()


class _Counted(tiny_model.Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros(1))


CASES = [(0, 1, 1), (1, 2, 1), (2, 3, 2), (3, 2, 1), (3, 3, 2), (3, 5, 2)]


@pytest.mark.parametrize(("stage", "ranks", "groups"), CASES)
def test_the_model_is_put_together(tmp_path: Path, stage: int, ranks: int, groups: int):
    folder = write(tmp_path, stage, ranks, groups)
    assert (format_of(folder), step_of(folder)) == ("deepspeed", 500)
    assert FORMATS["deepspeed"].is_complete(folder)
    module = _Counted()
    load_into(module, read_weights(folder, trust_pickle=True), folder.name)
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in WEIGHTS.items())
    assert torch.equal(state["head.weight"], WEIGHTS["embedding.weight"])
    assert state["counter"].tolist() == [3.0]


@pytest.mark.parametrize(("stage", "ranks", "groups"), CASES)
def test_it_is_complete_with_the_whole_file_of_every_rank(tmp_path: Path, stage: int, ranks: int, groups: int):
    folder = write(tmp_path, stage, ranks, groups)
    (tmp_path / "latest").write_text("global_step500")  # proves nothing
    for file in FORMATS["deepspeed"].files(folder):
        content = file.read_bytes()
        file.write_bytes(content[:-50])
        assert not FORMATS["deepspeed"].is_complete(folder)
        file.unlink()
        if FORMATS["deepspeed"].files(folder):
            assert not FORMATS["deepspeed"].is_complete(folder)
        file.write_bytes(content)
    assert FORMATS["deepspeed"].is_complete(folder)


def test_it_is_read_only_when_it_is_allowed(tmp_path: Path):
    folder = write(tmp_path, 2, 2)
    with pytest.raises(UnsupportedCheckpoint, match="allow it with --trust-pickle"):
        read_weights(folder)


def test_what_the_hugging_face_trainer_nests_is_found(tmp_path: Path):
    folder = write(tmp_path / "checkpoint-500", 3, 2).parent
    assert (format_of(folder), step_of(folder)) == ("deepspeed", 500)
    assert torch.equal(read_weights(folder, trust_pickle=True)["embedding.weight"], WEIGHTS["embedding.weight"])


def test_model_parallel_ranks_are_not_put_together(tmp_path: Path):
    folder = write(tmp_path, 0, 1)
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedCheckpoint, match=r"cut over model-parallel ranks \(mp_rank_01_model_states\.pt\)"):
        read_weights(folder, trust_pickle=True)


def test_frozen_parameters_are_said(tmp_path: Path):
    folder = write(tmp_path, 3, 1)
    first = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = {"module": {}, "param_shapes": [], "ds_config": {"zero_optimization": {"stage": 3}}, "dp_world_size": 1}
    torch.save({**content, "frozen_param_shapes": {"a": torch.Size([2])}}, first)
    with pytest.raises(UnsupportedCheckpoint, match="has frozen parameters"):
        read_weights(folder, trust_pickle=True)


@pytest.mark.parametrize("shape", [[1] * 65, [2**70], [-1], ["a"]], ids=["long", "large", "negative", "text"])
def test_a_shape_that_is_none_is_one_sentence(tmp_path: Path, shape: list):
    """A long one that every parameter shares, by reference, would take the memory of all of them."""
    folder = write(tmp_path, 3, 1)
    first = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = {"module": {}, "ds_config": {"zero_optimization": {"stage": 3}}, "dp_world_size": 1}
    torch.save({**content, "param_shapes": [dict.fromkeys("abc", shape)]}, first)
    with pytest.raises(CorruptCheckpoint, match="a parameter's shape is none"):
        read_weights(folder, trust_pickle=True)


def test_files_of_another_kind_are_one_sentence(tmp_path: Path):
    folder = write(tmp_path, 3, 2)
    torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CorruptCheckpoint, match="no checkpoint of ZeRO stage 3"):
        read_weights(folder, trust_pickle=True)
    torch.save({"dp_world_size": 10**9}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CorruptCheckpoint, match="does not say how many ranks"):
        FORMATS["deepspeed"].is_complete(folder)
