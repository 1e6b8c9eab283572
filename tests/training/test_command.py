"""Every command of the trainer says what went wrong in one sentence, and ends on Ctrl-C without a traceback."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import training
from rksp_core.errors import ConfigError
from training.command import ANEW, INTERRUPTED, carried_out

ROOT = Path(training.__file__).parent
COMMANDS = sorted(
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".")
    for path in ROOT.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def interrupted() -> int:
    raise KeyboardInterrupt


def mistaken() -> int:
    raise ConfigError("seed must be a number; correct it")


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (mistaken, 2, "name: seed must be a number; correct it\n"),
        (interrupted, INTERRUPTED, f"name: interrupted; {ANEW}\n"),
    ],
)
def test_a_command_ends_with_a_code_and_a_sentence(work, code, said, capsys: pytest.CaptureFixture[str]) -> None:
    assert carried_out("name", work, ANEW) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_carried_out_so(name: str) -> None:
    assert hasattr(importlib.import_module(name), "carried_out")
