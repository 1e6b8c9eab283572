"""Which names are checkpoints, and the step a name carries. Steps are numbers: 1000 comes after 999."""

from __future__ import annotations

import re
from pathlib import Path

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


def is_candidate(name: str) -> bool:
    """Whether a file or folder of this name may hold model weights, or is temporary or other state."""
    return not (_TEMPORARY.search(name) or _OTHER_STATE.search(name) or _SHARD.search(name))


def step_in(name: str, *, bare_number: bool = True) -> int | None:
    """Return the step that a name carries: ``step-00000100``, ``checkpoint_100.pt``, ``epoch=3-step=100.ckpt``.

    Without such a word the last number counts (``model-100.pt``), unless ``bare_number`` is False.
    """
    stem = Path(name).stem if Path(name).suffix and not Path(name).suffix[1:].isdigit() else name
    found = _STEP.findall(stem)
    if found:
        return int(found[-1])
    last = _LAST_NUMBER.search(stem) if bare_number else None
    return int(last.group(1)) if last else None
