"""The probe: a fixed batch that a model is profiled on, with a hash of its content.

Profiles can be compared only on the same probe. A probe file is a safetensors file whose metadata carries that hash,
so a batch that was changed on the way is noticed.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ProbeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rksp_monitor.models import LoadedModel

FORMAT = "rksp.probe/1"
TOKENS = "input_ids"
INPUTS = "inputs"  # the name of an unnamed batch of other tensors
SEQUENCES, LENGTH = 32, 64  # up to 2048 token states: Kim et al. 2026, App. D.3


@dataclass(frozen=True)
class Probe:
    """A batch of named tensors, their content hash, and where they come from.

    ``batch`` holds e.g. ``input_ids`` (sequences, length) int64 and, optionally, ``attention_mask`` of that shape.
    ``metadata`` is JSON: how the probe was made.
    """

    batch: Mapping[str, Tensor]
    origin: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.sha256:
            from rksp_core.batch import batch_sha256

            object.__setattr__(self, "sha256", batch_sha256(self.batch))

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says of the probe: hash, origin, shapes, the number of distinct tokens."""
        document: dict[str, Any] = {
            "sha256": self.sha256,
            "origin": self.origin,
            "tensors": {
                name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
                for name, value in self.batch.items()
            },
        }
        if TOKENS in self.batch:
            document["distinct_tokens"] = len(set(self.batch[TOKENS].flatten().tolist()))
        return document


def random_probe(vocabulary: int, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0) -> Probe:
    """Return ``sequences`` x ``length`` token ids, uniform over the vocabulary, from a generator of their own.

    Raises
    ------
    ProbeError
        When a number is not positive.
    """
    import torch

    for what, number in (("vocabulary", vocabulary), ("sequences", sequences), ("length", length)):
        if number < 1:
            raise ProbeError(f"a probe needs at least 1 for its {what}, got {number}")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sequences, length), generator=generator)
    metadata = {"vocabulary": vocabulary, "seed": seed}
    return Probe({TOKENS: tokens}, f"random tokens of a vocabulary of {vocabulary}, seed {seed}", metadata)


def default_probe(vocabulary: int, length: int, seed: int) -> Probe:
    """Return the random tokens that stand in where no probe was given; a report says so."""
    drawn = random_probe(vocabulary, length=length, seed=seed)
    return dataclasses.replace(drawn, metadata={**drawn.metadata, "default": True})


def write_probe(probe: Probe, path: str | os.PathLike[str]) -> None:
    """Write the probe as safetensors, atomically; the same probe gives the same content hash.

    Raises
    ------
    OSError
        As the file system says.
    """
    from safetensors.torch import save

    metadata = {
        "format": FORMAT,
        "sha256": probe.sha256,
        "origin": probe.origin,
        "metadata": json.dumps(dict(probe.metadata)),
    }
    write_atomic(path, save({name: value.contiguous() for name, value in probe.batch.items()}, metadata))


def read_probe(path: str | os.PathLike[str]) -> Probe:
    """Read a probe file, or a raw batch: ``.safetensors``, ``.npy``, or ``.pt`` / ``.pth`` with plain tensors.

    Raises
    ------
    ProbeError
        When the file is missing, has another format, is damaged, or its content does not have the hash it states.
    """
    source = Path(path)
    readers = {".safetensors": _read_safetensors, ".npy": _read_npy, ".pt": _read_torch, ".pth": _read_torch}
    reader = readers.get(source.suffix)
    if reader is None:
        raise ProbeError(
            f"a probe is a .safetensors, .npy, .pt or .pth file, got {source}; see `rksp probe make --help`"
        )
    try:
        return reader(source)
    except ProbeError:
        raise
    except OSError as error:
        raise ProbeError(f"{source} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each format has its own errors for a damaged file
        first = str(error).strip().partition("\n")[0]
        raise ProbeError(f"{source} is no readable batch ({type(error).__name__}: {first})") from error


def _read_safetensors(path: Path) -> Probe:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        batch = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if metadata.get("format") != FORMAT:
        return _raw(batch, path)
    probe = Probe(batch, metadata["origin"], json.loads(metadata["metadata"]))
    if probe.sha256 != metadata["sha256"]:
        raise ProbeError(
            f"{path} was changed after it was made (content {probe.sha256[:12]}, stated {metadata['sha256'][:12]}); "
            "make it again with `rksp probe make`"
        )
    return probe


def _read_npy(path: Path) -> Probe:
    import numpy as np
    import torch

    return _raw(torch.from_numpy(np.load(path, allow_pickle=False)), path)


def _read_torch(path: Path) -> Probe:
    import torch

    return _raw(torch.load(path, weights_only=True, mmap=True, map_location="cpu"), path)


def _raw(content: object, path: Path) -> Probe:
    """Name an unnamed tensor by its kind; whole numbers become int64, as embeddings want them."""
    import torch

    if isinstance(content, torch.Tensor):
        content = {INPUTS if content.is_floating_point() else TOKENS: content}
    if not isinstance(content, Mapping) or not content:
        raise ProbeError(f"{path} holds a {type(content).__name__}, expected a tensor or a mapping of names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ProbeError(f"{path} holds a {type(value).__name__} under {name!r}, expected a tensor")
    batch = {name: value if value.is_floating_point() else value.long() for name, value in content.items()}
    return Probe(batch, f"batch file {path.name}")


def check_probe(probe: Probe, model: LoadedModel) -> None:
    """Refuse a probe that the model cannot take.

    Raises
    ------
    ProbeError
        When tokens are no (sequences, length) matrix, lie outside the vocabulary or are too long, or when a tensor is
        empty, not finite, or of another number of sequences than its neighbours.
    """
    sizes = {name: tuple(value.shape) for name, value in probe.batch.items()}
    for name, value in probe.batch.items():
        if value.dim() < 2 or 0 in value.shape:
            raise ProbeError(f"{name} of the probe has shape {sizes[name]}, expected (sequences, length, ...)")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ProbeError(f"{name} of the probe holds values that are not finite; make the probe again")
    if len({size[0] for size in sizes.values()}) > 1:
        raise ProbeError(f"the probe's tensors differ in their number of sequences: {sizes}")
    if TOKENS in probe.batch:
        _check_tokens(probe.batch[TOKENS], model)
    mask = probe.batch.get("attention_mask")
    if mask is not None and TOKENS in sizes and sizes["attention_mask"] != sizes[TOKENS]:
        raise ProbeError(
            f"attention_mask has shape {sizes['attention_mask']}, expected that of {TOKENS}, {sizes[TOKENS]}"
        )


def _check_tokens(tokens: Tensor, model: LoadedModel) -> None:
    if tokens.dim() != 2:
        raise ProbeError(f"{TOKENS} of the probe has shape {tuple(tokens.shape)}, expected (sequences, length)")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (model.vocabulary is not None and high >= model.vocabulary):
        limit = "0 or more" if model.vocabulary is None else f"0 to {model.vocabulary - 1}"
        raise ProbeError(
            f"the probe has token ids {low} to {high}, but {model.source} takes {limit}; "
            "make one with this model's tokenizer: `rksp probe make`"
        )
    if model.max_length is not None and tokens.shape[1] > model.max_length:
        raise ProbeError(
            f"the probe has length {tokens.shape[1]}, but {model.source} takes at most {model.max_length}; "
            "make a shorter one with `rksp probe make --length`"
        )


def model_input(
    probe: Probe, module: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensor | dict[str, Tensor]:
    """Return the batch as the module's forward takes it: named, or a single tensor that it takes by position.

    Tensors are moved to ``device``; floating-point ones are cast to ``dtype`` when it is given.

    Raises
    ------
    ProbeError
        When the probe has several tensors and forward does not take them by their names.
    """
    batch = {
        name: value.to(device, dtype if value.is_floating_point() else None) for name, value in probe.batch.items()
    }
    parameters = inspect.signature(module.forward).parameters
    if all(name in parameters for name in batch):
        return batch
    if len(batch) == 1:
        return next(iter(batch.values()))
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return batch
    raise ProbeError(
        f"the model takes {', '.join(parameters)}, but the probe holds {', '.join(batch)}; "
        "name its tensors as forward does"
    )
