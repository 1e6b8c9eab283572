"""A state dict -> the parameters of a module that was built beforehand, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rksp_core.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
LISTED = 3  # names in a message


def load_into(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Copy the weights into the module, in place; the module's dtype and device stay.

    Parameters
    ----------
    module
        The model that the checkpoint belongs to.
    weights
        Tensors by name; a prefix that all names share because the model was wrapped is taken off.
    name
        The checkpoint's, for the message.

    Raises
    ------
    CorruptCheckpoint
        When names are missing or unexpected, or shapes differ: the checkpoint is of another model.
    """
    import torch

    wanted = module.state_dict(keep_vars=False)
    found = _without_prefix(weights, wanted)
    shared = _sharing_storage(wanted, found)
    missing = [key for key in wanted if key not in found and key not in shared]
    unexpected = [key for key in found if key not in wanted]
    misshapen = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    if missing or unexpected or misshapen:
        findings = [
            f"{what} {_some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("shapes:", misshapen))
            if keys
        ]
        raise CorruptCheckpoint(f"{name} does not fit the model: {'; '.join(findings)}; give the model it was made by")
    with torch.no_grad():
        for key, value in found.items():
            wanted[key].copy_(value)


def _without_prefix(weights: Mapping[str, Tensor], wanted: Iterable[str]) -> Mapping[str, Tensor]:
    """Take wrappers' prefixes off, one after another, as long as the names then fit the model better."""
    known = set(wanted)
    while True:
        fitting = len(known & weights.keys())
        for prefix in PREFIXES:
            if weights and all(key.startswith(prefix) for key in weights):
                shorter = {key.removeprefix(prefix): value for key, value in weights.items()}
                if len(known & shorter.keys()) >= fitting:
                    weights = shorter
                    break
        else:
            return weights


def _sharing_storage(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> set[str]:
    """Return the names whose memory a found name fills too: tied weights are often stored once."""
    filled = {value.data_ptr() for key, value in wanted.items() if key in found and value.numel()}
    return {key for key, value in wanted.items() if value.numel() and value.data_ptr() in filled}


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
