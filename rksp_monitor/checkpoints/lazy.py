"""Tensors that are read when they are asked for: a checkpoint costs the memory of one tensor, and no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Described:
    """What is known of a tensor before it is read. ``dtype`` is torch's name of it, ``float32`` say."""

    shape: tuple[int, ...]
    dtype: str


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name; each look-up reads the tensor again, so that none is kept."""

    def __init__(self, described: Mapping[str, Described], read: Callable[[str], Tensor]) -> None:
        self._described = described
        self._read = read

    def describe(self, name: str) -> Described:
        """Return shape and dtype without reading the tensor."""
        return self._described[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._described:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)


def describe(weights: Mapping[str, Tensor], name: str) -> Described:
    """Return shape and dtype of one of the tensors, which is read only when the mapping is not lazy."""
    if isinstance(weights, LazyTensors):
        return weights.describe(name)
    tensor = weights[name]
    return Described(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
