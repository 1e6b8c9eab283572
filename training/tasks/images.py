"""Image classification: CIFAR-10, Fashion-MNIST, digits, or any folder of a subfolder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.schema.task import FASHION_MNIST
from training.tasks import AUGMENTATION, EVALUATION, PROBE, SPLIT, TRAINING, Batch
from training.tasks.epochs import chosen
from training.tasks.image_sets import ImageSet, Labelled, cifar10, class_folders, digits, fashion_mnist

HELD_OUT = 0.2  # of a data set that sets nothing aside
PROBED = 0.125  # of what is held out


class Images:
    """Batches of a data set for one seed.

    Each channel is scaled to mean 0 and variance 1 over all pixels of the training images. Training goes through them
    epoch by epoch. Of the held-out images (a fifth, drawn by the seed, where the data set has none) an eighth is
    the probe's, the others are the evaluation's; both are taken in turn, in an order drawn by the seed.

    Parameters
    ----------
    data, path
        ``cifar10`` | ``fashion_mnist`` | ``digits`` | ``folder``, and where it lies: `training.tasks.image_sets`.
    augment
        Shift each training image by up to an eighth of its size (He et al. 2016: 4 pixels of 32), filled up with
        black, and flip every second one left to right. No good for digits, which mean nothing in a mirror.
    image, channels, classes
        What the model takes: height and width, to which images are scaled (bilinear), colours and labels; None: as
        the data set has them.
    seed
        With stream and step it determines a batch completely.

    Raises
    ------
    ConfigError
        When the data set is not there or does not fit the model.
    """

    inputs_name = "pixel_values"

    def __init__(
        self,
        data: str,
        path: str | None,
        augment: bool,
        image: int | None,
        channels: int | None,
        classes: int | None,
        seed: int,
    ) -> None:
        found = _read(data, path, image, channels)
        self.training, held_out = found if found.held_out else _split(found.training, seed)
        if len(held_out.labels) < 2:
            raise ConfigError(
                f"{data} holds out {len(held_out.labels)} images; at least 2 are needed, give more images"
            )
        self.augment, self.seed = augment, seed
        here = self.training.images.shape[1]
        if channels not in {None, here}:
            raise ConfigError(
                f"the images of {data} have {here} channels, the model {channels}; set model.arguments.channels"
            )
        largest = max(int(part.labels.max()) for part in (self.training, held_out))
        if classes is not None and largest >= classes:
            raise ConfigError(f"{data} has {largest + 1} classes, the model {classes}; set model.arguments.classes")
        self.image = self.training.images.shape[-1] if image is None else image
        order = np.random.default_rng([seed, SPLIT]).permutation(len(held_out.labels))
        probed = max(1, round(PROBED * len(order)))
        self.held_out = {
            PROBE: Labelled(*(part[order[:probed]] for part in held_out)),
            EVALUATION: Labelled(*(part[order[probed:]] for part in held_out)),
        }
        self.evaluation_items = len(order) - probed
        self.mean, self.deviation = _moments(self.training.images)

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return ``size`` images (B, C, H, W) float32 and their labels (B,)."""
        if stream == TRAINING:
            numbers = chosen(len(self.training.labels), self.seed, step, size)
            images, labels = (part[numbers] for part in self.training)
            if self.augment:
                images = shifted_and_flipped(images, np.random.default_rng([self.seed, AUGMENTATION, step]))
        else:
            held_out = self.held_out[stream]
            numbers = (step * size + np.arange(size)) % len(held_out.labels)
            images, labels = (part[numbers] for part in held_out)
        pixels = torch.from_numpy(images).float().sub_(self.mean).div_(self.deviation)
        if self.image != pixels.shape[-1]:
            pixels = functional.interpolate(pixels, (self.image, self.image), mode="bilinear", antialias=True)
        return Batch(pixels, torch.from_numpy(labels))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the classes, in nats, from logits (B, K)."""
        return functional.cross_entropy(logits, targets)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of images whose class ranks first."""
        return (logits.argmax(dim=-1) == targets).float().mean()


def shifted_and_flipped(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return images (B, C, H, W), each at a place of its own in a black frame, and some of them mirrored."""
    count, _, height, width = images.shape
    edge = max(1, height // 8)
    framed = np.pad(images, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    down, right = random.integers(0, 2 * edge, (2, count, 1), endpoint=True)  # (B, 1) each
    rows, columns = down + np.arange(height), right + np.arange(width)  # (B, H), (B, W)
    columns = np.where(random.random((count, 1)) < 0.5, columns[:, ::-1], columns)
    which = np.arange(count)[:, None, None]
    moved = framed.transpose(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return np.ascontiguousarray(moved.transpose(0, 3, 1, 2))


def _read(data: str, path: str | None, image: int | None, channels: int | None) -> ImageSet:
    if data == "cifar10":
        return cifar10.read(Path(str(path)))
    if data == "fashion_mnist":
        return fashion_mnist.read(Path(path or FASHION_MNIST))
    if data == "digits":
        return digits.read(Path(path) if path else None)
    if image is None:
        raise ConfigError("task.data = 'folder' needs task.image, the height and width that images are scaled to")
    return class_folders.read(Path(str(path)), image, channels or 3)


def _split(everything: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    order = np.random.default_rng([seed, SPLIT]).permutation(len(everything.labels))
    first = round(HELD_OUT * len(order))
    held_out, training = (Labelled(*(part[some] for part in everything)) for some in (order[:first], order[first:]))
    return training, held_out


def _moments(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (C, 1, 1); summed as whole numbers, so exactly."""
    total = squares = np.zeros(images.shape[1], dtype=np.uint64)
    for first in range(0, len(images), 1024):
        part = images[first : first + 1024].astype(np.uint32)
        total = total + part.sum(axis=(0, 2, 3), dtype=np.uint64)
        squares = squares + (part * part).sum(axis=(0, 2, 3), dtype=np.uint64)
    count = images.size // images.shape[1]
    mean = total / count
    deviation = np.sqrt(squares / count - mean**2)
    deviation[deviation == 0] = 1.0  # a channel that says nothing
    return torch.from_numpy(mean).float().view(-1, 1, 1), torch.from_numpy(deviation).float().view(-1, 1, 1)
