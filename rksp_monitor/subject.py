"""What checkpoints are replayed with: a model, a probe and numerical settings, fixed for a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rksp_core.errors import ProbeError
from rksp_core.profile import ModelProfile

if TYPE_CHECKING:
    from collections.abc import Callable

    from rksp_monitor.models import LoadedModel
    from rksp_monitor.probe import Probe


@dataclass(frozen=True)
class SubjectSettings:
    """How to build a `Subject`; plain values, so that it can be told to another process as JSON."""

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    probe: str | None = None
    seed: int = 0
    device: str = "auto"
    samples: int = 2048
    sequences: int = 32
    length: int = 64
    blocks: str | None = None

    @property
    def identity(self) -> str:
        """The settings as one text: checkpoints that failed with others deserve another try."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)


class Subject:
    """A model that takes the weights of one checkpoint after another, and is profiled on one probe.

    Raises
    ------
    ModelError, ProbeError, DeviceError
        When the model cannot be built, the probe does not fit it, or the device is not here.
    """

    def __init__(self, settings: SubjectSettings) -> None:
        from rksp_core.capture import find_blocks
        from rksp_core.device import choose_device
        from rksp_monitor.models import load_model
        from rksp_monitor.probe import check_probe, model_input

        self.settings = settings
        device = choose_device(settings.device)
        self.model = load_model(settings.model, arguments=settings.arguments, seed=settings.seed)
        self.probe = _probe(self.model, settings)
        check_probe(self.probe, self.model)
        self.module = self.model.module.to(device)
        find_blocks(self.module, settings.blocks)  # a model without any is refused now, not at every checkpoint
        self._batch = model_input(self.probe, self.module, device)

    def profile(self, path: Path, progress: Callable[[int, int, str], None] | None = None) -> ModelProfile:
        """Load a checkpoint's weights and profile the model; the same file gives the same profile.

        Raises
        ------
        CheckpointError
            When the checkpoint is incomplete, gone, damaged, or of another model.
        """
        from rksp_core.profiling import profile_model
        from rksp_monitor.checkpoints import read_weights, step_of
        from rksp_monitor.weights import load_into

        load_into(self.module, read_weights(path), path.name)
        settings = self.settings
        profile = profile_model(
            self.module,
            self._batch,
            blocks=settings.blocks,
            samples=settings.samples,
            seed=settings.seed,
            progress=progress,
            probe=self.probe.to_dict(),
        )
        return dataclasses.replace(profile, step=step_of(path))


def _probe(model: LoadedModel, settings: SubjectSettings) -> Probe:
    from rksp_monitor.probe import random_probe, read_probe

    if settings.probe is not None:
        return read_probe(settings.probe)
    if model.vocabulary is None:
        raise ProbeError(f"{model.source} does not say how many tokens it takes, so none can be drawn; give a --probe")
    length = min(settings.length, model.max_length or settings.length)
    return random_probe(model.vocabulary, settings.sequences, length, settings.seed)
