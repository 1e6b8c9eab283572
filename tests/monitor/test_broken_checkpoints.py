"""Every broken checkpoint of `tests.monitor.broken`, read in this process: weights, or one sentence of its class."""

from __future__ import annotations

from pathlib import Path

import pytest

from rksp_core.errors import CheckpointError, ExpiredCheckpoint
from rksp_monitor.checkpoints import FORMATS, format_of, read_weights
from rksp_monitor.weights import load_into
from tests.monitor import broken, tiny_model


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary") / "sang"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, canary: Path) -> list[tuple[broken.Case, Path]]:
    templates, run = tmp_path_factory.mktemp("templates"), tmp_path_factory.mktemp("run")
    found = list(broken.cases(templates, canary, every=10, flips=8))
    return [(case, case.make(run, step)) for step, case in enumerate(found, start=1) if case.reads]


def outcome(path: Path) -> tuple[str, str]:
    """Return the class and the sentence that the watcher would give this path in the end."""
    name = format_of(path)
    if name is None:
        return broken.UNSEEN, ""
    try:
        complete = FORMATS[name].is_complete(path)
        if not complete:
            return "failed", f"it was {broken.NEVER_FINISHED}: {complete.problem}"
        load_into(tiny_model.build(**broken.ARGUMENTS), read_weights(path), path.name)
    except ExpiredCheckpoint as error:
        return "expired", str(error)
    except CheckpointError as error:
        return "failed", str(error)
    return "done", ""


def test_each_has_its_class_and_one_sentence_and_no_code_runs(made, canary):
    assert len(made) > 200
    complaints = [complaint for case, path in made if (complaint := case.complaint(*outcome(path)))]
    assert not complaints, "\n".join(complaints)
    assert not canary.exists()


def test_the_canary_would_sing(tmp_path: Path):
    """What is refused above does harm where pickles are trusted: the cases are no blanks."""
    import torch

    (case,) = [
        case
        for case in broken.cases(tmp_path / "t", tmp_path / "sang", every=50, flips=1)
        if case.name == "pt: a pickle that runs a command"
    ]
    run = tmp_path / "run"
    run.mkdir()
    torch.load(case.make(run, 1), weights_only=False)
    assert (tmp_path / "sang").exists()
