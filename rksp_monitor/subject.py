"""What checkpoints are replayed with: a model, a probe and numerical settings, fixed for a run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rksp_core.errors import MemoryLimitError, ProbeError, RkspError
from rksp_core.profile import ModelProfile
from rksp_monitor.memory import exhausted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from rksp_monitor.models import LoadedModel
    from rksp_monitor.probe import Probe

KEPT_SECONDS = 3600.0  # for so long fewer sequences, or the CPU, are kept to: what held the memory may be gone then


@dataclass(frozen=True)
class SubjectSettings:
    """How to build a `Subject`, and how to profile it; plain values, so that they can be told to another process.

    Parameters
    ----------
    model, arguments, probe, seed, device, samples, sequences, length, blocks
        As the keys of the configuration.
    micro_batch
        Sequences in one forward pass; None takes all of the probe. Fewer are taken when memory runs out.
    cpu_fallback
        Whether a checkpoint that does not fit the device, one sequence at a time, is profiled on the CPU.
    trust_pickle
        Whether objects that are no tensors, as DeepSpeed's, are looked past in a pickle; none of them is ever made or
        run (`checkpoints.inert_pickle`).
    noise_groups
        Groups of sequences that the standard errors of a profile are measured over, where they are asked for.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    probe: str | None = None
    seed: int = 0
    device: str = "auto"
    samples: int = 2048
    sequences: int = 32
    length: int = 64
    blocks: str | None = None
    micro_batch: int | None = None
    cpu_fallback: bool = True
    trust_pickle: bool = False
    noise_groups: int = 4

    @property
    def identity(self) -> str:
        """What decides a checkpoint's outcome, as one text: those that failed with another deserve another try."""
        # `micro_batch` changes no profile and noise no outcome; the other two decide whether there is one.
        document = dataclasses.asdict(self)
        for name in ("micro_batch", "noise_groups"):
            del document[name]
        return json.dumps(document, sort_keys=True, default=str)

    @property
    def building(self) -> str:
        """The settings and the state of the files that a subject is built of: equal texts, equal subjects."""
        files = [Path(self.model), Path(self.model, "config.json"), *([Path(self.probe)] if self.probe else [])]
        return json.dumps([dataclasses.asdict(self), [_stamp(file) for file in files]], sort_keys=True, default=str)


@dataclass(frozen=True)
class Attempt:
    """A way to run the model: on the ``place``-th device, so many sequences in one forward pass."""

    place: int
    device: str
    micro_batch: int


class Subject:
    """A model that takes the weights of one checkpoint after another, and is profiled on one probe.

    Parameters
    ----------
    settings
        What is built.
    places
        Devices to try in turn when memory runs out; None takes the settings' device, then the CPU where that is
        allowed.

    Raises
    ------
    ModelError, ProbeError, DeviceError
        When the model cannot be built, the probe does not fit it, or the device is not here.
    """

    def __init__(self, settings: SubjectSettings, places: Sequence[str] | None = None) -> None:
        from rksp_core.batch import sequences
        from rksp_core.capture import find_blocks
        from rksp_core.device import choose_device
        from rksp_monitor.models import load_model
        from rksp_monitor.probe import check_probe, model_input

        self.settings = settings
        device = str(choose_device(settings.device))
        self.model = load_model(settings.model, arguments=settings.arguments, seed=settings.seed)
        self.probe = _probe(self.model, settings)
        check_probe(self.probe, self.model)
        self.module = self.model.module
        find_blocks(self.module, settings.blocks)  # a model without any is refused now, not at every checkpoint
        self._batch = model_input(self.probe, self.module)
        count = sequences(self._batch)
        fallback = ["cpu"] if settings.cpu_fallback and device != "cpu" else []
        self._attempts = _attempts(places or [device, *fallback], min(settings.micro_batch or count, count))
        self._used, self._since = 0, 0.0
        self._buffers = self._unsaved_buffers()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the last profile was made with otherwise than asked, because memory ran out; one sentence each."""
        asked, used = self._attempts[0], self._attempts[self._used]
        notes = []
        if used.place > asked.place:
            notes.append(f"on {used.device}, because {asked.device} ran out of memory")
        if used.micro_batch < asked.micro_batch:
            size = f"{used.micro_batch} of {asked.micro_batch} sequences in one forward pass"
            notes.append(f"{size}, because {used.device} ran out of memory")
        return tuple(notes)

    def describe(self) -> dict[str, Any]:
        """Return what a log says of it, as JSON."""
        return {"model": self.model.source, "kind": self.model.kind, "probe": self.probe.to_dict()}

    def profile(
        self, path: Path, progress: Callable[[int, int, str], None] | None = None, *, noise: bool = False
    ) -> ModelProfile:
        """Load a checkpoint's weights and profile the model; the same file gives the same profile.

        It does not depend on what was profiled before: the weights and all buffers are set anew, those that no
        checkpoint holds to what they were when the model was built, and the random state is seeded. What a model keeps
        elsewhere (in plain attributes) stays its own affair.

        When memory runs out, it is tried with half as many sequences in one forward pass, down to one, then on the
        next device; what worked is kept for an hour.

        Parameters
        ----------
        noise
            Whether to measure the standard errors of the profile too (`rksp_core.noise`), as ``ModelProfile.noise``.

        Raises
        ------
        CheckpointError
            When the checkpoint is incomplete, gone, damaged, or of another model.
        MemoryLimitError
            When one sequence is too many everywhere.
        """
        from rksp_monitor.checkpoints import in_one_state, read_weights, step_of

        with in_one_state(path):
            weights = read_weights(path, trust_pickle=self.settings.trust_pickle)
            profile = self._fitting(weights, path.name, progress, noise=noise)
        return dataclasses.replace(profile, step=step_of(path))

    def _fitting(
        self,
        weights: Mapping[str, Tensor],
        name: str,
        progress: Callable[[int, int, str], None] | None,
        *,
        noise: bool,
    ) -> ModelProfile:
        """Profile with as many sequences in one forward pass as fit into memory."""
        if time.monotonic() - self._since > KEPT_SECONDS:
            self._used = 0
        while True:
            try:
                return self._profile(weights, name, self._attempts[self._used], progress, noise=noise)
            except (MemoryError, RuntimeError, RkspError) as error:
                if not exhausted(error):
                    raise
                if self._used + 1 == len(self._attempts):
                    raise MemoryLimitError(
                        f"out of memory on {self._attempts[-1].device}, even with one sequence at a time; "
                        "lower samples or the probe's length, or free some memory"
                    ) from error
            self._used, self._since = self._used + 1, time.monotonic()
            self._release()  # outside of `except`: the error holds the tensors that did not fit

    def _profile(
        self,
        weights: Mapping[str, Tensor],
        name: str,
        attempt: Attempt,
        progress: Callable[[int, int, str], None] | None,
        *,
        noise: bool,
    ) -> ModelProfile:
        from rksp_core.profiling import profile_model
        from rksp_monitor.models import seeded
        from rksp_monitor.weights import load_into

        settings = self.settings
        self.module.to(attempt.device)
        load_into(self.module, weights, name)
        self._restore_buffers(attempt.device)
        options: dict[str, Any] = {
            "blocks": settings.blocks,
            "samples": settings.samples,
            "seed": settings.seed,
            "micro_batch": attempt.micro_batch,
        }
        with seeded(settings.seed):
            _seed_cuda(settings.seed)
            profile = profile_model(self.module, self._batch, **options, progress=progress, probe=self.probe.to_dict())
        if not noise or not settings.noise_groups:
            return profile
        from rksp_core.noise import profile_noise

        self._restore_buffers(attempt.device)
        with seeded(settings.seed):
            _seed_cuda(settings.seed)
            errors = profile_noise(self.module, self._batch, groups=settings.noise_groups, **options)
        return dataclasses.replace(profile, noise=errors)

    def _release(self) -> None:
        """Give back what the attempt that failed still holds; a model that was moved halfway is put together again."""
        import torch

        self.module.to("cpu")
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def _unsaved_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers that are in no checkpoint: a forward pass may change them."""
        saved = self.module.state_dict().keys()
        return {name: value.clone() for name, value in self.module.named_buffers() if name not in saved}

    def _restore_buffers(self, device: str) -> None:
        for name, value in self._buffers.items():
            owner, _, key = name.rpartition(".")
            setattr(self.module.get_submodule(owner), key, value.to(device, copy=True))


def _attempts(places: Sequence[str], most: int) -> list[Attempt]:
    """Return the ways to run the model, in the order in which they are tried."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return [Attempt(place, device, size) for place, device in enumerate(places) for size in sizes]


def _seed_cuda(seed: int) -> None:
    """Seed the devices too; `random_state_kept`, around it, puts their states back."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what changes when the file does; None when there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = file.stat()
        return found.st_mtime_ns, found.st_size
    return None


def _probe(model: LoadedModel, settings: SubjectSettings) -> Probe:
    from rksp_monitor.probe import random_probe, read_probe

    if settings.probe is not None:
        return read_probe(settings.probe)
    if model.vocabulary is None:
        raise ProbeError(f"{model.source} does not say how many tokens it takes, so none can be drawn; give a --probe")
    length = min(settings.length, model.max_length or settings.length)
    return random_probe(model.vocabulary, settings.sequences, length, settings.seed)
