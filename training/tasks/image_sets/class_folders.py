"""PNG and JPEG files in one subfolder a class, in the folder itself or below ``train`` and ``test`` (or ``val``).

All images are read at once, scaled to one size, and held in memory as bytes: N x channels x image^2 of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from training.tasks.image_sets import ImageSet, Labelled, wrong

SUFFIXES = {".png", ".jpg", ".jpeg"}
MODES = {1: "L", 3: "RGB"}
EXPECTED = "a folder with one subfolder of .png or .jpg files for each class, or train and test with these"


def read(folder: Path, image: int, channels: int) -> ImageSet:
    """Return the images, their classes numbered in the order of the subfolders' names.

    Parameters
    ----------
    image
        Height and width; an image that is not square is stretched.
    channels
        1 (grey) or 3 (colour); images are converted.

    Raises
    ------
    ConfigError
        When there are no images, one cannot be read, or train and test have other classes.
    """
    training = folder / "train"
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None or not training.is_dir():
        return ImageSet(_labelled(folder, _classes(folder), image, channels), None)
    classes = _classes(training)
    if _classes(held_out) != classes:
        raise wrong(held_out, f"has the classes {', '.join(_classes(held_out))}", f"those of {training}")
    return ImageSet(*(_labelled(part, classes, image, channels) for part in (training, held_out)))


def _classes(folder: Path) -> list[str]:
    try:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and _files(path))
    except OSError as error:
        raise wrong(folder, f"cannot be read ({error.strerror})", EXPECTED) from error
    if not classes:
        raise wrong(folder, "holds no images", EXPECTED)
    return classes


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _labelled(folder: Path, classes: list[str], image: int, channels: int) -> Labelled:
    files = [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]
    pixels = np.empty((len(files), channels, image, image), dtype=np.uint8)
    for place, (file, _) in zip(pixels, files, strict=True):
        try:
            with Image.open(file) as picture:
                scaled = picture.convert(MODES[channels]).resize((image, image), Image.Resampling.BILINEAR)
        except OSError as error:
            raise wrong(file, f"cannot be read ({error})", "a PNG or JPEG image") from error
        place[:] = np.asarray(scaled).reshape(image, image, channels).transpose(2, 0, 1)
    return Labelled(pixels, np.array([label for _, label in files], dtype=np.int64))
