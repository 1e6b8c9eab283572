"""Checkpoints that appear complete in one rename, and what a bitwise exact resume needs beside the weights.

    checkpoints/step-00000100/
        checkpoint.json       schema, run_id, step, metrics of the last step, configuration, state (KSS, labels, order)
      and, by ``checkpoint.format``,
        model.safetensors     safetensors: the weights; all that a monitor reads
        model.pt              pt: {"model": weights}, for ``torch.load(weights_only=True)``
        training_state.pt     both: the optimizer
        .metadata, *.distcp   dcp: "model" and "optimizer" by `torch.distributed.checkpoint`, a shard a process

    checkpoints/undone-1/     those that the run went back to before, the first time

Where weights are trained in another form (spectral or weight normalization), that form is kept beside the plain one.

The folder is filled under a name that starts with a dot, every file is synced, then it is renamed: whoever sees
``step-00000100`` sees all of it. Every process must call `CheckpointWriter.write`: sharded weights are gathered.

A run resumes from its own checkpoints only: DCP reads its ``.metadata`` by unpickling it, so do not put a stranger's
there. (`rksp watch` reads it with an unpickler that knows nothing else.)
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from rksp_core.errors import CheckpointError
from training.config import Checkpoint
from training.ranks import Ranks, sharded
from training.stabilizers import parametrized, plain_state_dict

SCHEMA = "rksp.checkpoint/2"
DESCRIPTION, STATE = "checkpoint.json", "training_state.pt"
WEIGHTS = {"safetensors": "model.safetensors", "pt": "model.pt"}


class CheckpointWriter:
    """Writes the checkpoints of a run, and removes those that are not kept.

    Parameters
    ----------
    folder
        ``checkpoints/`` of the run.
    settings
        Format, retention, and whether the writing goes on beside the training.
    """

    def __init__(self, folder: Path, settings: Checkpoint, ranks: Ranks) -> None:
        self._folder, self._settings, self._ranks = folder, settings, ranks
        self._pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        # Shards are written from a thread, whose messages must not meet those of the training.
        self._group = distributed.new_group(backend="gloo") if settings.format == "dcp" and ranks.size > 1 else None
        if ranks.first:
            for name in (".step-*.tmp", ".step-*.removed", "undone-*/.step-*.removed"):  # of a process that was killed
                for left in folder.glob(name):
                    shutil.rmtree(left, ignore_errors=True)

    def write(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, description: Mapping[str, Any]
    ) -> None:
        """Write ``step-<step>``, or begin to; a checkpoint of that step that is already there stays.

        ``description`` is JSON.

        Raises
        ------
        CheckpointError
            When it cannot be written.
        """
        self.finish()
        target, staging = self._folder / f"step-{step:08d}", self._folder / f".step-{step:08d}.tmp"
        if self._ranks.from_first([target.exists()]) != [0.0]:  # rank 0 publishes: the others may look too early
            return
        document = {"schema": SCHEMA, "step": step, "format": self._settings.format, **description}
        with self._ranks.together(), _writing(target):
            if self._ranks.first:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        if self._settings.format == "dcp":
            self._write_shards(staging, model, optimizer, document)
            return
        if sharded(model) or self._ranks.first:
            weights, state = _whole(model, optimizer)
        with self._ranks.together(), _writing(target):
            if self._ranks.first:
                self._write_files(staging, weights, state)
                _publish(staging, document)
                self._retain(checkpoints(self._folder))

    def settle(self) -> None:
        """Publish a checkpoint that has been written meanwhile. DCP is done on rank 0 when it is done everywhere."""
        if self._pending is not None and self._ranks.from_first([self._pending[0].done()]) != [0.0]:
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written, and publish it.

        Raises
        ------
        CheckpointError
            When it could not be written.
        """
        if self._pending is None:
            return
        future, staging, document = self._pending
        self._pending = None
        with self._ranks.together(), _writing(staging):
            future.result()
            if self._ranks.first:
                _publish(staging, document)
                self._retain(checkpoints(self._folder))

    def set_aside_after(self, step: int) -> None:
        """Move the checkpoints of later steps, one that is still being written too, to ``undone-N``: the run went back.

        As many stay as are kept of the run's own, of all that were ever set aside.
        """
        self.finish()
        later = [path for path in checkpoints(self._folder) if step_of(path) > step] if self._ranks.first else []
        if not later:
            return
        aside = next(place for n in itertools.count(1) if not (place := self._folder / f"undone-{n}").exists())
        aside.mkdir()
        for checkpoint in later:
            checkpoint.rename(aside / checkpoint.name)
        undone = sorted(self._folder.glob("undone-*"), key=lambda place: (len(place.name), place.name))
        self._retain([path for place in undone for path in checkpoints(place)])

    def _write_files(self, staging: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        path = staging / WEIGHTS[self._settings.format]
        if self._settings.format == "pt":
            torch.save({"model": dict(weights)}, path)
        else:
            save_file(_unshared(weights), path)
        torch.save(dict(state), staging / STATE)

    def _write_shards(
        self, staging: Path, model: nn.Module, optimizer: torch.optim.Optimizer, document: dict[str, Any]
    ) -> None:
        import torch.distributed.checkpoint as dcp

        content = _shards(model, optimizer)
        _one_process_is_fine()
        with self._ranks.together(), _writing(staging):
            future = dcp.async_save(content, checkpoint_id=staging, process_group=self._group)
        self._pending = (future, staging, document)
        if not self._settings.asynchronous:
            self.finish()

    def _retain(self, written: Sequence[Path]) -> None:
        """Remove what is not kept, oldest first; each vanishes in one rename before it is deleted."""
        if self._settings.keep_last is None:
            return
        for checkpoint in written[: -self._settings.keep_last]:
            if self._settings.keep_every and step_of(checkpoint) % self._settings.keep_every == 0:
                continue
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    leaving = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first, compared as numbers."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring model and optimizer to where the checkpoint was written, and return its ``state``.

    Raises
    ------
    CheckpointError
        When a file is missing or damaged, or it is of another model.
    """
    with _saying(f"cannot resume from {checkpoint}", "remove it to resume from the one before"):
        document = json.loads((checkpoint / DESCRIPTION).read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"it has schema {document['schema']!r}, expected {SCHEMA!r}")
        if document["format"] == "dcp":
            _load_shards(checkpoint, model, optimizer)
        else:
            state = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
            weights = state["weights"] if "weights" in state else _load_weights(checkpoint, document["format"])
            _restore_whole(model, optimizer, weights, state["optimizer"])
        if document["step"] == 0:
            optimizer.state.clear()  # as it was: see `_states`
        return dict(document["state"])


def _load_weights(checkpoint: Path, form: str) -> dict[str, Tensor]:
    path = checkpoint / WEIGHTS[form]
    if form == "safetensors":
        return load_file(path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True, map_location="cpu")["model"]
    return weights


def _whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights that a monitor reads, and the training state; where they are sharded, on rank 0 only."""
    if sharded(model):
        weights, state = _states(model, optimizer, full_state_dict=True, cpu_offload=True)
        return weights, {"optimizer": state}
    plain = {name: tensor.detach().cpu() for name, tensor in plain_state_dict(model).items()}
    own = {"weights": model.state_dict()} if parametrized(model) else {}
    return plain, {"optimizer": optimizer.state_dict(), **own}


def _states(
    model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return torch's state of both, and leave an optimizer that has made no step as it is.

    `get_state_dict` lets it make one, with gradients of 0, to see what its state will be: Adam would count it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    fresh = not optimizer.state
    states = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    if fresh:
        optimizer.state.clear()
    return states


def _unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with a copy of those that are tied to another, which safetensors does not know."""
    own: dict[int, Tensor] = {}
    for tensor in weights.values():
        own.setdefault(tensor.data_ptr(), tensor)
    return {name: (t if own[t.data_ptr()] is t else t.clone()).contiguous() for name, t in weights.items()}


def _restore_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    if not sharded(model):
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    named = _named(state, model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=named, options=options)


def _named(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state with parameters called by name, where a single process has numbered them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order: dict[Any, str] = dict(enumerate(names[p] for group in optimizer.param_groups for p in group["params"]))
    return {
        "state": {order.get(key, key): value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [order.get(key, key) for key in group["params"]]} for group in state["param_groups"]
        ],
    }


def _shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, state = _states(model, optimizer)
    if parametrized(model):
        return {"model": plain_state_dict(model), "optimizer": state, "trained": weights}
    return {"model": weights, "optimizer": state}


def _load_shards(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    content = _shards(model, optimizer)
    _one_process_is_fine()
    dcp.load(content, checkpoint_id=checkpoint)
    weights = content.get("trained", content["model"])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=content["optimizer"])


def _one_process_is_fine() -> None:
    """Let DCP not warn that it runs without other processes; for good, as it warns from threads of its own too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _publish(staging: Path, document: Mapping[str, Any]) -> None:
    (staging / DESCRIPTION).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in (*staging.iterdir(), staging):
        _sync(path)
    target = staging.with_name(staging.name.removeprefix(".").removesuffix(".tmp"))
    staging.rename(target)
    _sync(target.parent)


@contextmanager
def _saying(what: str, remedy: str) -> Iterator[None]:
    """Put into one sentence whatever the libraries raise. DCP's own is no `Exception`, and says tracebacks."""
    try:
        yield
    except BaseException as caught:
        gathered = getattr(caught, "failures", None)  # of DCP: the error of each process
        error = next(iter(gathered.values()))[0] if gathered else caught
        if not isinstance(error, Exception):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{what} ({reason}); {remedy}") from error


def _writing(path: Path) -> AbstractContextManager[None]:
    return _saying(f"cannot write the checkpoint {path}", "free some space or change output")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
