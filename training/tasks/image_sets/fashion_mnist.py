"""Fashion-MNIST (Xiao et al. 2017), 70 000 grey images of 28 x 28 in 10 classes, and whatever else has MNIST's files.

The format is IDX (LeCun): two zero bytes, 8 for unsigned bytes, the number of dimensions, each of them as a 32-bit
big-endian number, then the bytes. Files may be compressed (``.gz``), as they are published.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from training.tasks.image_sets import ImageSet, Labelled, wrong

EXPECTED = (
    "a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same for t10k, as they are or as .gz "
    "(Debian: apt-get install dataset-fashion-mnist)"
)


def read(folder: Path) -> ImageSet:
    """Return the 60 000 training images and the 10 000 held-out ones.

    Raises
    ------
    ConfigError
        When a file is missing or is no IDX file.
    """
    return ImageSet(*(_labelled(folder, name) for name in ("train", "t10k")))


def _labelled(folder: Path, name: str) -> Labelled:
    images, labels = _idx(folder / f"{name}-images-idx3-ubyte", 3), _idx(folder / f"{name}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise wrong(folder, f"has {len(images)} images and {len(labels)} labels for {name}", EXPECTED)
    return Labelled(images[:, np.newaxis], labels.astype(np.int64))


def _idx(path: Path, dimensions: int) -> np.ndarray:
    packed = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise wrong(packed, f"is damaged ({error})", EXPECTED) from error
    except OSError as error:
        raise wrong(path, f"cannot be read ({error.strerror})", EXPECTED) from error
    head = 4 + 4 * dimensions
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, head, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != head + math.prod(shape):
        raise wrong(path, f"is no IDX file of {dimensions} dimensions", EXPECTED)
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)
