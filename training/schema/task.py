"""What is trained on: one section a task, told apart by ``name``; `training.tasks` has a module of that name for each.

``batch`` is the number of sequences or images of a step, over all processes and micro-batches. What the model needs to
know as well (``shared``: its vocabulary and length, say) is written once: a task takes it from ``model.arguments``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from training.schema.section import Count, Section


class AssociativeRecall(Section):
    """``pairs`` keys and values, then filler, then a key whose value is asked for."""

    shared: ClassVar[tuple[str, ...]] = ("vocabulary", "length")

    name: Literal["associative_recall"] = "associative_recall"
    batch: Count = 32
    pairs: Count = 4
    vocabulary: Count
    length: Count


Task = AssociativeRecall
