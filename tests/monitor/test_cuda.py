"""Replays on a GPU: the CPU's figures, and memory that really runs out there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rksp_core.profile import ModelProfile
from rksp_monitor.replay import ReplayPool
from rksp_monitor.subject import Subject, SubjectSettings
from training.models.gpt import GPT

pytestmark = pytest.mark.gpu

# A block's widest activation takes 4 MiB a sequence, 64 MiB for the whole probe, beside cuBLAS's own 32 MiB.
SHAPE = {"vocabulary": 256, "length": 1024, "width": 256, "depth": 2, "heads": 4}
GPU = SubjectSettings("training.models.gpt:GPT", arguments=SHAPE, samples=512, sequences=16, length=1024, device="cuda")
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "step-00000100.safetensors"
    save_file({name: value.contiguous() for name, value in GPT(**SHAPE).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> ModelProfile:
    return Subject(dataclasses.replace(GPU, device="cpu")).profile(checkpoint)


@contextlib.contextmanager
def _memory(size: int) -> Iterator[None]:
    """Let torch allocate no more than ``size`` bytes on the GPU; its own error comes beyond that."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _assert_close(one: ModelProfile, other: ModelProfile) -> None:
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for name in ("near_unit_mass", "spectral_radius", "sigma_max", "kreiss_constant"):
            # float32 sums run in another order on a GPU; at random weights nothing amplifies that.
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name


def test_a_gpu_gives_the_figures_of_the_cpu_each_time_the_same(checkpoint: Path, on_cpu: ModelProfile):
    subject = Subject(GPU)
    profile = subject.profile(checkpoint)
    assert subject.notes == ()
    assert subject.profile(checkpoint) == profile
    _assert_close(profile, on_cpu)


def test_fewer_sequences_at_a_time_when_the_gpu_is_full(checkpoint: Path, on_cpu: ModelProfile):
    subject = Subject(GPU)
    with _memory(128 * MIB):
        _assert_close(subject.profile(checkpoint), on_cpu)
    (note,) = subject.notes
    assert note.endswith("of 16 sequences in one forward pass, because cuda ran out of memory")


def test_the_cpu_when_one_sequence_is_too_many(checkpoint: Path, on_cpu: ModelProfile):
    subject = Subject(GPU)
    with _memory(24 * MIB):
        assert subject.profile(checkpoint) == on_cpu
    assert subject.notes == ("on cpu, because cuda ran out of memory",)


def test_a_worker_takes_the_gpu_by_itself(checkpoint: Path, on_cpu: ModelProfile):
    with contextlib.closing(ReplayPool()) as pool:
        replayer = pool.replayer("run", dataclasses.replace(GPU, device="auto"), timeout=120)
        first, second = (replayer.replay(checkpoint).profile for _ in range(2))
        assert list(pool.pids) == ["cuda:0"]
    assert first == second
    _assert_close(first, on_cpu)
