"""Checkpoints that appear complete in one rename, and what a bitwise exact resume needs beside the weights.

    checkpoints/step-00000100/
        model.safetensors     the weights; all that a monitor reads
        checkpoint.json       schema, run_id, step, metrics of the last step, configuration
        training_state.pt     optimizer, random state, KSS, divergence labels; plain data (weights_only=True loads it)

The folder is filled under a name that starts with a dot, every file is synced, then it is renamed: whoever sees
``step-00000100`` sees all of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rksp_core.errors import CheckpointError

SCHEMA = "rksp.checkpoint/1"
WEIGHTS, DESCRIPTION, STATE = "model.safetensors", "checkpoint.json", "training_state.pt"


def save_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], description: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-<step>`` and return it; a checkpoint of that step that is already there stays.

    ``state`` holds tensors, numbers, strings and containers of them; ``description`` is JSON.

    Raises
    ------
    CheckpointError
        When it cannot be written.
    """
    target = folder / f"step-{step:08d}"
    staging = folder / f".step-{step:08d}.tmp"
    if target.exists():
        return target
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, staging / WEIGHTS)
        torch.save(dict(state), staging / STATE)
        document = {"schema": SCHEMA, "step": step, **description}
        (staging / DESCRIPTION).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            _sync(path)
        staging.rename(target)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {target} ({error.strerror or error}); free some space or change output"
        ) from error
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first, compared as numbers."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the training state, on the CPU.

    Raises
    ------
    CheckpointError
        When a file is missing or damaged.
    """
    try:
        state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
        return load_file(checkpoint / WEIGHTS), state
    except Exception as error:
        raise CheckpointError(
            f"cannot resume from {checkpoint} ({type(error).__name__}); remove it to resume from the one before"
        ) from error


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the ``count`` newest checkpoints; each vanishes in one rename before it is deleted."""
    for checkpoint in checkpoints(folder)[:-count]:
        leaving = checkpoint.with_name(f".{checkpoint.name}.removed")
        shutil.rmtree(leaving, ignore_errors=True)
        checkpoint.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
