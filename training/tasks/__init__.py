"""What a model is trained on. A task gives batches, the loss, and the accuracy."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

# Streams of random numbers that must never meet: a batch is a pure function of (seed, stream, step). The last three
# give no batches: they draw the order of an epoch, shifts and flips of images, and what is held out.
TRAINING, PROBE, EVALUATION, ORDER, AUGMENTATION, SPLIT = range(6)


class Batch(NamedTuple):
    """``inputs`` of the model: token ids (B, T) int64 or images (B, C, H, W); ``targets`` as the loss wants them."""

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """What the loop asks of a task; ``inputs_name`` is what the model's forward calls its input.

    ``evaluation_items`` is how many different sequences or images the stream EVALUATION has; None: without end.
    """

    inputs_name: str
    evaluation_items: int | None

    def batch(self, stream: int, step: int, size: int) -> Batch:
        """Return the batch of this stream and step; the training steps count from 1."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the batch, a scalar, from the model's logits."""
        ...

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the share of right answers, a scalar in [0, 1]."""
        ...
