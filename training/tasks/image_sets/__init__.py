"""Where images come from: a module a data set, each with ``read``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rksp_core.errors import ConfigError


class Labelled(NamedTuple):
    """``images`` (N, C, H, W) uint8 and ``labels`` (N,) int64, 0..K-1."""

    images: np.ndarray
    labels: np.ndarray


class ImageSet(NamedTuple):
    """What is trained on and what is held out; ``held_out`` is None where the data set makes no such difference."""

    training: Labelled
    held_out: Labelled | None


def wrong(path: object, what: str, expected: str) -> ConfigError:
    """Return the error about a file or folder that is not what its data set has there."""
    return ConfigError(f"task.path: {path} {what}; expected {expected}")
