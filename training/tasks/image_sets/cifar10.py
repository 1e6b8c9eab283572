"""CIFAR-10 (Krizhevsky 2009), 60 000 colour images of 32 x 32 in 10 classes, in either of its published forms.

The binary form (``data_batch_1.bin``, ..) is rows of a label and 3072 pixels. The Python form (``data_batch_1``, ..) is
pickles of NumPy arrays, and a pickle may run any code: this reader builds arrays, lists and strings, and refuses the
file at any other name in it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.tasks.image_sets import ImageSet, Labelled, wrong

TRAINING = tuple(f"data_batch_{number}" for number in range(1, 6))
HELD_OUT = ("test_batch",)
PIXELS = (3, 32, 32)
EXPECTED = "the folder of CIFAR-10 with data_batch_1 to 5 and test_batch, each a .bin file or as Python's"


def read(folder: Path) -> ImageSet:
    """Return CIFAR-10 as published: 50 000 training images and 10 000 held-out ones.

    Raises
    ------
    ConfigError
        When a file is missing or is not CIFAR-10's.
    """
    return ImageSet(*(_join([_batch(folder / name) for name in names]) for names in (TRAINING, HELD_OUT)))


def _batch(path: Path) -> Labelled:
    binary = path.with_name(f"{path.name}.bin")
    try:
        if binary.exists():
            return _binary(binary)
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
        images, labels = content[b"data"], np.array(content[b"labels"], dtype=np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), np.prod(PIXELS)):
            raise ValueError(f"its array has shape {images.shape}")
    except OSError as error:
        raise wrong(path, f"cannot be read ({error.strerror})", EXPECTED) from error
    except Exception as error:  # a damaged pickle raises anything
        raise wrong(path, f"is no batch of CIFAR-10 ({error})", EXPECTED) from error
    return Labelled(images.reshape(-1, *PIXELS), labels)


def _binary(path: Path) -> Labelled:
    rows = np.fromfile(path, dtype=np.uint8)
    if not rows.size or rows.size % (1 + np.prod(PIXELS)):
        raise ValueError(f"{path.name} has {rows.size} bytes, no multiple of 3073")
    rows = rows.reshape(-1, 1 + np.prod(PIXELS))
    return Labelled(rows[:, 1:].reshape(-1, *PIXELS), rows[:, 0].astype(np.int64))


def _join(batches: list[Labelled]) -> Labelled:
    return Labelled(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def _dtype(kind: str | bytes, align: object = False, copy: object = False) -> np.dtype:
    """Return a plain dtype; the pickles give 0 and 1 for False and True, which NumPy 2.4 deprecates."""
    return np.dtype(kind, align=bool(align), copy=bool(copy))


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows NumPy arrays only (NumPy 1 and 2 have two names for their constructor)."""

    _known: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray.__new__,
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray.__new__,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs") from None
