"""What a batch is: one tensor, a tuple of positional arguments, or a dict of keyword arguments of the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def call(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    """Run the model on the batch: ``model(tensor)``, ``model(*tuple)`` or ``model(**dict)``."""
    if isinstance(batch, Mapping):
        return model(**batch, **extra)
    if isinstance(batch, tuple | list):
        return model(*batch, **extra)
    return model(batch, **extra)


def named_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the batch with their names; positional ones are called by their number."""
    if isinstance(batch, Tensor):
        yield "0", batch
        return
    items = batch.items() if isinstance(batch, Mapping) else ((str(i), value) for i, value in enumerate(batch))
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value


def sequences(batch: Batch) -> int:
    """Return the number of sequences: the first dimension of the first tensor.

    Raises
    ------
    ValueError
        When the batch holds no tensor with a dimension.
    """
    for _, tensor in named_tensors(batch):
        if tensor.ndim:
            return int(tensor.shape[0])
    raise ValueError("a batch must hold a tensor of at least one dimension; got none")


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Return the sequences start..stop of the batch; what has another first dimension is passed on whole."""
    count = sequences(batch)
    if start == 0 and stop >= count:
        return batch

    def cut(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    return _map(batch, cut)


def select(batch: Batch, kept: Bool[Tensor, " sequences"]) -> Batch:
    """Return the sequences of the batch that are kept; what has another first dimension is passed on whole."""
    count = sequences(batch)

    def cut(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == count
        return value[kept.to(value.device)] if rows else value

    return _map(batch, cut)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with all its tensors on ``device``."""
    return _map(batch, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def token_mask(batch: Batch, *, decoder: bool = False) -> Bool[Tensor, "sequences length"] | None:
    """Return True where a token is real: ``attention_mask`` (1 = real), ``src_key_padding_mask`` (True = padding).

    ``decoder`` asks about the decoder's tokens: where the batch has some of its own, ``decoder_attention_mask``.
    """
    if not isinstance(batch, Mapping):
        return None
    own = decoder and ("decoder_input_ids" in batch or "decoder_inputs_embeds" in batch)
    mask = batch.get("decoder_attention_mask" if own else "attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    padding = batch.get("src_key_padding_mask")
    if isinstance(padding, Tensor) and padding.ndim == 2:
        return ~padding if padding.dtype == torch.bool else padding == 0
    return None


def batch_sha256(batch: Batch) -> str:
    """Return a hash of the content: names, dtypes, shapes and bytes of all tensors, whatever their order or device.

    Two profiles belong together only when their probes have this hash in common.
    """
    digest = hashlib.sha256()
    # A lone tensor and {"input_ids": tensor} are the same probe to a model, so they share a name here.
    entries = [("input_ids", batch)] if isinstance(batch, Tensor) else sorted(named_tensors(batch))
    for name, tensor in entries:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def _map(batch: Batch, function: Any) -> Batch:
    if isinstance(batch, Mapping):
        return {name: function(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(function(value) for value in batch)
    result: Tensor = function(batch)
    return result
