"""What a profile depends on, and what it does not: micro-batches, memory, and what was profiled before."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rksp_core.errors import IncompleteCheckpoint, MemoryLimitError, ModelError
from rksp_core.profile import SUMMARY_FIELDS, ModelProfile
from rksp_monitor import subject as subjects
from rksp_monitor.memory import exhausted, memory_limit
from rksp_monitor.replay_worker import SUBJECTS, Subjects
from rksp_monitor.subject import Subject, SubjectSettings
from rksp_monitor.weights import load_into
from tests.monitor import broken, tiny_model

HUNGRY = SubjectSettings("tests.monitor.tiny_model:build_hungry", samples=256, sequences=8, length=32, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for step in (100, 200):
        tiny_model.save_folder(run, step)
    return run / "checkpoints"


def _hungry(most: int = 32, moves: int = 0, **changes: object) -> SubjectSettings:
    return dataclasses.replace(HUNGRY, arguments={"most": most, "moves": moves}, **changes)


def _assert_close(one: ModelProfile, other: ModelProfile) -> None:
    for name in SUMMARY_FIELDS:
        np.testing.assert_allclose(one.values(name), other.values(name), rtol=1e-10, err_msg=name)


def test_shards_of_two_states_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trainer went back, and writes the same step again while it is replayed."""
    subject = Subject(SubjectSettings(broken.MODEL, arguments=broken.ARGUMENTS, samples=64, device="cpu"))
    folder = broken.write(tmp_path / "step-100", "sharded", broken.weights())
    shard = min(folder.glob("*.safetensors"))

    def load(*given: object) -> None:
        load_into(*given)
        os.utime(shard, (1, 1))

    monkeypatch.setattr("rksp_monitor.weights.load_into", load)
    with pytest.raises(IncompleteCheckpoint, match="was written anew while it was read"):
        subject.profile(folder)
    assert subject.profile(folder).step == 100


@pytest.mark.parametrize(("most", "left"), [(7, 4), (2, 2), (1, 1)])
def test_fewer_sequences_are_tried_until_they_fit_and_the_profile_is_the_same(folder: Path, most: int, left: int):
    whole = Subject(_hungry()).profile(folder / "step-00000100")
    subject = Subject(_hungry(most))
    _assert_close(subject.profile(folder / "step-00000100"), whole)
    assert subject.notes == (f"{left} of 8 sequences in one forward pass, because cpu ran out of memory",)


def test_nothing_is_noted_when_everything_fits(folder: Path):
    subject = Subject(_hungry(4, micro_batch=3))
    subject.profile(folder / "step-00000100")
    assert subject.notes == ()


def test_the_next_device_is_taken_when_one_sequence_is_too_many(folder: Path):
    # Attempts with 8, 4, 2 and 1 sequences move the model to the device and back: eight moves, then it is elsewhere.
    subject = Subject(_hungry(moves=9), places=("cpu", "cpu"))
    _assert_close(subject.profile(folder / "step-00000100"), Subject(_hungry()).profile(folder / "step-00000100"))
    assert subject.notes == ("on cpu, because cpu ran out of memory",)


def test_out_of_memory_everywhere_is_one_sentence(folder: Path):
    subject = Subject(_hungry(0))
    with pytest.raises(MemoryLimitError, match="out of memory on cpu, even with one sequence at a time; lower"):
        subject.profile(folder / "step-00000100")


def test_what_fitted_is_kept_for_an_hour(folder: Path, monkeypatch: pytest.MonkeyPatch):
    subject = Subject(_hungry(2))
    subject.profile(folder / "step-00000100")
    subject.module.most = 8  # whoever held the memory has gone
    subject.profile(folder / "step-00000200")
    assert subject.notes
    monkeypatch.setattr(subjects, "KEPT_SECONDS", -1.0)
    subject.profile(folder / "step-00000200")
    assert subject.notes == ()


def test_a_profile_does_not_depend_on_what_was_profiled_before(folder: Path):
    """Otherwise a drift would be one of the model's own counters; random numbers are seeded for each profile."""
    settings = dataclasses.replace(HUNGRY, model="tests.monitor.tiny_model:build_drifting")
    fresh = Subject(settings).profile(folder / "step-00000100")
    used = Subject(settings)
    for _ in range(2):
        used.profile(folder / "step-00000200")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert used.profile(folder / "step-00000100") == fresh
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_measured_where_it_is_asked_for(folder: Path):
    """By a forward pass of the same weights, buffers and random numbers as the profile's."""
    settings = dataclasses.replace(HUNGRY, model="tests.monitor.tiny_model:build_drifting")
    subject = Subject(settings)
    plain, measured = (subject.profile(folder / "step-00000100", noise=noise) for noise in (False, True))
    assert not plain.noise
    assert measured.noise["near_unit_mass_mean"] > 0
    assert dataclasses.replace(measured, noise={}) == plain
    assert Subject(settings).profile(folder / "step-00000100", noise=True) == measured
    assert (
        not Subject(dataclasses.replace(settings, noise_groups=0)).profile(folder / "step-00000100", noise=True).noise
    )


def test_every_way_to_run_out_of_memory_is_recognised():
    text = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    for error in (MemoryError(), torch.OutOfMemoryError("of torch"), RuntimeError(text), RuntimeError("out of memory")):
        assert exhausted(error)
    wrapped = ModelError("Tiny raised RuntimeError on the probe")
    wrapped.__cause__ = RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 2 bytes")
    assert exhausted(wrapped)
    assert not exhausted(RuntimeError("shapes do not match"))
    with pytest.raises(MemoryLimitError, match="out of memory on cuda:0; lower it"), memory_limit("cuda:0", "lower it"):
        raise torch.OutOfMemoryError("of torch")


def test_identity_is_what_decides_an_outcome():
    same = dataclasses.replace(HUNGRY, micro_batch=1, noise_groups=0)
    assert same.identity == HUNGRY.identity
    for changes in ({"trust_pickle": True}, {"seed": 1}, {"blocks": "blocks.*"}, {"cpu_fallback": False}):
        assert dataclasses.replace(HUNGRY, **changes).identity != HUNGRY.identity


def test_the_subjects_used_last_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = Subjects()
    variants = [dataclasses.replace(HUNGRY, seed=seed) for seed in range(SUBJECTS + 1)]
    assert [kept.take(settings)[1] for settings in variants[:SUBJECTS]] == [True] * SUBJECTS
    assert not kept.take(variants[0])[1]
    assert kept.take(variants[-1])[1]  # takes the place of the second, which was used the longest ago
    assert not kept.take(variants[0])[1]
    assert kept.take(variants[1])[1]


def test_near_the_memory_limit_only_one_subject_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = Subjects(memory_limit=2**20)
    other = dataclasses.replace(HUNGRY, seed=1)
    assert [kept.take(settings)[1] for settings in (HUNGRY, HUNGRY, other, HUNGRY)] == [True, False, True, True]


def test_a_probe_that_was_written_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rksp_monitor.probe import random_probe, write_probe

    monkeypatch.setattr(sys, "path", list(sys.path))
    probe = tmp_path / "probe.safetensors"
    settings = dataclasses.replace(HUNGRY, probe=str(probe))
    kept = Subjects()
    for seed in (1, 2):
        written = random_probe(32, sequences=4 + seed, seed=seed)
        write_probe(written, probe)
        subject, built = kept.take(settings)
        assert built
        assert subject.describe()["probe"]["sha256"] == written.sha256
    assert json.loads(json.dumps(subject.describe())) == subject.describe()
