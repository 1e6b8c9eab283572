"""What is trained on: one section a task, told apart by ``name``; `training.tasks` has a module of that name for each.

``batch`` is the number of sequences or images of a step, over all processes and micro-batches. What the model needs to
know as well (``shared``: its vocabulary and length, say) is written once: a task takes it from ``model.arguments``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from training.schema.section import Count, Section

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it


class AssociativeRecall(Section):
    """``pairs`` keys and values, then filler, then ``queries`` keys whose values are asked for; the paper has one."""

    shared: ClassVar[tuple[str, ...]] = ("vocabulary", "length")

    name: Literal["associative_recall"] = "associative_recall"
    batch: Count = 32
    pairs: Count = 4
    queries: Count = 1
    vocabulary: Count
    length: Count


class SyntheticLM(Section):
    """Repetitions, runs of consecutive ids, and noise; the paper has a vocabulary of 10 000 and sequences of 256."""

    shared: ClassVar[tuple[str, ...]] = ("vocabulary", "length")

    name: Literal["synthetic_lm"] = "synthetic_lm"
    batch: Count = 16
    training_sequences: Count = 20_000
    validation_sequences: Count = 2_000
    vocabulary: Count
    length: Count


class Text(Section):
    """A file of text, or all files below a folder whose names end in ``suffix``, as one long row of tokens.

    ``tokenizer`` is ``bytes`` (256 ids), a ``tokenizer.json`` or the folder of one; ``separator`` stands between
    files. The last ``held_out`` share of the text is never trained on, unless ``validation`` names another text for
    that. ``cache`` is where the tokens are kept (null: the folder ``.rksp-tokens`` beside the text).
    """

    shared: ClassVar[tuple[str, ...]] = ("vocabulary", "length")

    name: Literal["text"] = "text"
    batch: Count = 16
    path: str = Field(min_length=1)
    suffix: str = ".txt"
    separator: str = "\n"
    tokenizer: str = Field(default="bytes", min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    cache: str | None = Field(default=None, min_length=1)
    vocabulary: Count
    length: Count


class Images(Section):
    """Images and their classes; ``path`` is the folder that holds the data set, or (digits) its csv file.

    Fashion-MNIST is looked for where Debian's package puts it, and digits come with scikit-learn; ``folder`` is any
    folder of one subfolder of PNG or JPEG files a class. ``image``, ``channels`` and ``classes`` are the model's;
    images of another size are scaled to ``image``. ``augment`` shifts and flips the training images.
    """

    shared: ClassVar[tuple[str, ...]] = ("image", "channels", "classes")

    name: Literal["images"] = "images"
    batch: Count = 32
    data: Literal["cifar10", "fashion_mnist", "digits", "folder"]
    path: str | None = Field(default=None, min_length=1)
    augment: bool = False
    image: Count | None = None
    channels: Literal[1, 3] | None = None
    classes: Count | None = None

    @model_validator(mode="after")
    def _path_is_given(self) -> Images:
        if self.path is None and self.data in {"cifar10", "folder"}:
            raise ValueError(f"task.path is missing: the folder that holds the images of task.data = {self.data!r}")
        return self


Task = Annotated[AssociativeRecall | SyntheticLM | Text | Images, Field(discriminator="name")]
