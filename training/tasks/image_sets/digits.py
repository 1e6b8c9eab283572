"""1797 handwritten digits of 8 x 8 (Alpaydin and Kaynak 1998), the test set of UCI's; pixels are 0..16.

They come with scikit-learn; its csv file (64 pixels and the label a row, ``.gz`` or not) does as well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rksp_core.errors import ConfigError
from training.tasks.image_sets import ImageSet, Labelled, wrong


def read(path: Path | None) -> ImageSet:
    """Return all digits; none of them is set aside.

    Raises
    ------
    ConfigError
        When scikit-learn is missing, or the file is another.
    """
    rows = _of_scikit_learn() if path is None else _of_file(path)
    return ImageSet(Labelled(rows[:, :64].astype(np.uint8).reshape(-1, 1, 8, 8), rows[:, 64].astype(np.int64)), None)


def _of_scikit_learn() -> np.ndarray:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "task.data = 'digits' needs scikit-learn; pip install scikit-learn, or give its digits.csv as task.path"
        ) from error
    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def _of_file(path: Path) -> np.ndarray:
    expected = "a csv file of 64 pixels, 0..16, and a digit a row"
    try:
        rows = np.loadtxt(path, delimiter=",", ndmin=2)
    except OSError as error:
        raise wrong(path, "cannot be read", expected) from error
    except ValueError as error:
        raise wrong(path, "is no table of numbers", expected) from error
    if rows.shape[1] != 65 or rows.min(initial=0) < 0 or rows.max(initial=0) > 16:
        raise wrong(path, f"has rows of {rows.shape[1]} numbers", expected)
    return rows
