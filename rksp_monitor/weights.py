"""A state dict -> the parameters of a module that was built beforehand, all of them or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rksp_core.errors import CorruptCheckpoint
from rksp_monitor.checkpoints.lazy import describe
from rksp_monitor.checkpoints.names import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

# What wrappers put into names, at the front or in the middle: DistributedDataParallel, torch.compile, FSDP,
# activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
PREFERRED = ("", "model.")  # of several copies of the model, such as averaged weights
LISTED = 3  # names in a message


def load_into(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Copy the weights into the module, in place; the module's dtype and device stay.

    Names, shapes and dtypes are compared before anything is copied, so a checkpoint of another model changes nothing.
    Then one tensor after another is read: a checkpoint whose bytes turn out to be damaged leaves the module with a
    part of them, until the next one, which replaces every tensor.

    Parameters
    ----------
    module
        The model that the checkpoint belongs to.
    weights
        Tensors by name. What wrappers put into the names is taken out, and so is one prefix under which the whole model
        is found, as Lightning's ``model.``; what is beside that prefix belongs to something else, and is left.
    name
        The checkpoint's, for the message.

    Raises
    ------
    CorruptCheckpoint
        When names are missing or unexpected, or shapes or kinds of numbers differ: the checkpoint is of another model.
    """
    import torch

    name = shown(name)
    wanted = module.state_dict(keep_vars=False)
    places = _places(wanted, weights, {key for key, _ in module.named_buffers()}, name)
    shared = _sharing_storage(wanted, places)
    missing = [key for key in wanted if key not in places and key not in shared]
    unexpected = [key for key in places if key not in wanted]
    stored = {key: describe(weights, places[key]) for key in wanted if key in places}
    findings = {
        "missing": missing,
        "unexpected": unexpected,
        "shapes:": [
            f"{shown(key)} is {shown(str(found.shape))}, expected {tuple(wanted[key].shape)}"
            for key, found in stored.items()
            if found.shape != tuple(wanted[key].shape)
        ],
        "numbers:": [
            f"{shown(key)} is {found.dtype}, expected {_dtype(wanted[key])}"
            for key, found in stored.items()
            if _kind(found.dtype) != _kind(_dtype(wanted[key]))
        ],
    }
    if any(findings.values()):
        said = "; ".join(f"{what} {_some(keys)}" for what, keys in findings.items() if keys)
        raise CorruptCheckpoint(f"{name} does not fit the model: {said}; give the model it was made by")
    with torch.no_grad():
        for key, place in places.items():
            wanted[key].copy_(weights[place])


def _places(wanted: Iterable[str], weights: Iterable[str], buffers: set[str], name: str) -> dict[str, str]:
    """Return {name in the model: name in the checkpoint}, and unexpected names as themselves.

    Names beside the prefix (`_prefix`) are left out; so are those of buffers that the model has and does not store.
    """
    by_plain = {_plain(key): key for key in wanted}
    plain = {_plain(key): key for key in weights}
    if len(by_plain) < len(list(wanted)) or len(plain) < len(list(weights)):  # names that differ by a wrapper alone
        by_plain, plain = {key: key for key in wanted}, {key: key for key in weights}
    prefix = _prefix(by_plain, plain, name)
    places = {}
    for key, place in plain.items():
        if key.startswith(prefix):
            places[by_plain.get(key.removeprefix(prefix), place)] = place
    known = set(by_plain.values())
    return {key: place for key, place in places.items() if key in known or key not in buffers}


def _prefix(wanted: Mapping[str, str], found: Iterable[str], name: str) -> str:
    """Return the prefix under which most of the model's names are found, when those are at least half of them."""
    fitting: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                fitting[".".join([*parts[:cut], ""]) if cut else ""] += 1
    most = max(fitting.values(), default=0)
    best = sorted(prefix for prefix in fitting if fitting[prefix] == most and 2 * most >= len(wanted))
    preferred = next((prefix for prefix in PREFERRED if prefix in best), None)
    if preferred is None and len(best) > 1:
        raise CorruptCheckpoint(
            f"{name} holds the model {len(best)} times, under {_some(best)}; save one of them, or call it model"
        )
    return "" if not best else best[0] if preferred is None else preferred


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(dtype: str) -> str:
    """Return which numbers a dtype holds: those of one kind are converted, those of another are of another model."""
    return next((kind for kind in ("float", "complex", "int", "bool") if kind in dtype), dtype)


def _sharing_storage(wanted: Mapping[str, Tensor], found: Mapping[str, str]) -> set[str]:
    """Return the names whose memory a found name fills too: tied weights are often stored once."""
    filled = {value.data_ptr() for key, value in wanted.items() if key in found and value.numel()}
    return {key for key, value in wanted.items() if value.numel() and value.data_ptr() in filled}


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(shown(key) for key in names[:LISTED]) + (f" and {more} more" if more > 0 else "")
