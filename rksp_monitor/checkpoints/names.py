"""Which names are checkpoints, and the step a name carries. Steps are numbers: 1000 comes after 999."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TypeGuard

# State of the run that is no model: never replayed, and often pickled.
_OTHER_STATE = re.compile(
    r"(^|[-_.])(optim(izer)?|(training|trainer)[-_](state|args)|scheduler|lr[-_]scheduler|rng([-_]state)?|"
    r"random[-_]states?|(grad[-_])?scaler|sampler|dataloader)([-_.\d]|$)",
    re.IGNORECASE,
)
_TEMPORARY = re.compile(
    r"^(\.|tmp[-_])|(\.|-)(tmp|partial|part|incomplete)$|\.orbax-checkpoint-tmp|^_?incomplete", re.IGNORECASE
)
_SHARD = re.compile(r"-\d+-of-\d+")
_STEP = re.compile(
    r"(?:^|[-_.=])(?:global[-_]?)?(?:step|iter(?:ation)?|checkpoint|ckpt)[-_=]?(\d+)(?!\d)", re.IGNORECASE
)
_LAST_NUMBER = re.compile(r"(?:^|[-_=])(\d+)$")
_NO_TEXT = re.compile("[\ud800-\udfff]")  # what Python makes of the bytes of a name that is no UTF-8
_LONGEST_SHOWN = 200
_REMEMBERED = 2**14  # names: those of a folder are asked about again for each new one in it
_LARGEST_STEP = 10**12  # a timestamp in a name (20261122030900) is no step: after it, every step would be late


@functools.lru_cache(_REMEMBERED)
def is_candidate(name: str) -> bool:
    """Whether a file or folder of this name may hold model weights: text, not temporary, and no other state."""
    return not any(pattern.search(name) for pattern in (_NO_TEXT, _TEMPORARY, _OTHER_STATE, _SHARD))


def is_step(value: object) -> TypeGuard[int]:
    """Whether a value that a name or a document states can be a step."""
    return type(value) is int and 0 <= value <= _LARGEST_STEP


def shown(text: str) -> str:
    """Return a name as it can stand in a sentence: on one line, printable, and not endless."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


@functools.lru_cache(_REMEMBERED)
def step_in(name: str, *, bare_number: bool = True) -> int | None:
    """Return the step that a name carries: ``step-00000100``, ``checkpoint_100.pt``, ``epoch=3-step=100.ckpt``.

    Without such a word the last number counts (``model-100.pt``), unless ``bare_number`` is False.
    """
    stem = Path(name).stem if Path(name).suffix and not Path(name).suffix[1:].isdigit() else name
    found = _STEP.findall(stem) or (_LAST_NUMBER.findall(stem) if bare_number else [])
    step = int(found[-1]) if found else None
    return step if is_step(step) else None
