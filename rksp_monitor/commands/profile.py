"""``rksp profile CHECKPOINT`` and ``rksp compare BASELINE CHECKPOINT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rksp_core.errors import ExpiredCheckpoint, ModelError
from rksp_monitor.commands.output import emit, terminal
from rksp_monitor.commands.preflight import parse_arguments, progress_bar
from rksp_monitor.output_file import require_writable

if TYPE_CHECKING:
    from rksp_core.profile import ModelProfile
    from rksp_monitor.subject import Subject

Format = Literal["table", "json"]
INCONCLUSIVE = 3

Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="What weights are loaded into; default: the run's config.yaml, or its config.json."
    ),
]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the factory, as YAML.")
]
ProbeFile = Annotated[
    Path | None, typer.Option("--probe", help="Probe file; default: the run's probe.safetensors, else random tokens.")
]
Blocks = Annotated[str | None, typer.Option(metavar="GLOB", help="Residual blocks, e.g. 'transformer.h.*'.")]
Samples = Annotated[int, typer.Option(min=2, help="Token states to profile.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of random tokens and sampling.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:n]")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Look past objects that are no tensors, as DeepSpeed's; none is run.")
]
Form = Annotated[Format, typer.Option("--format", help="Of the report on stdout.")]
OutputFile = Annotated[Path | None, typer.Option(help="Write the report there instead of to stdout.")]


def profile(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a profile file.")],
    model: Model = None,
    arg: Arguments = None,
    probe: ProbeFile = None,
    blocks: Blocks = None,
    samples: Samples = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    trust_pickle: TrustPickle = False,
    form: Form = "table",
    output_file: OutputFile = None,
) -> int:
    """Profile one checkpoint on a probe."""
    if output_file is not None:
        require_writable(output_file)
    source = _Source(model, parse_arguments(arg or []), probe, blocks, samples, seed, device, trust_pickle)
    result = source.profile(checkpoint)
    if form == "json":
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        from rksp_monitor.report.profile import profile_table

        text = profile_table(result, _title(checkpoint, result), **terminal(output_file))
    emit(text, output_file, "the report is in")
    return 0 if result.summary["near_unit_mass"]["mean"] is not None else INCONCLUSIVE


def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="A profile file, or an earlier checkpoint.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A profile file, or a checkpoint.")],
    model: Model = None,
    arg: Arguments = None,
    probe: ProbeFile = None,
    blocks: Blocks = None,
    samples: Samples = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    trust_pickle: TrustPickle = False,
    form: Form = "table",
    output_file: OutputFile = None,
) -> int:
    """Say what moved between a baseline and a checkpoint, layer by layer."""
    if output_file is not None:
        require_writable(output_file)
    from rksp_core.compare import compare as set_beside

    source = _Source(model, parse_arguments(arg or []), probe, blocks, samples, seed, device, trust_pickle)
    before, after = source.profile(baseline), source.profile(checkpoint)
    comparison = set_beside(before, after)
    if form == "json":
        text = json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n"
    else:
        from rksp_monitor.report.profile import comparison_table

        title = f"{_title(checkpoint, after)}\nagainst {_title(baseline, before)}: value (change)"
        text = comparison_table(comparison, title, **terminal(output_file))
    emit(text, output_file, "the report is in")
    known = after.summary["near_unit_mass"]["mean"] is not None and before.summary["near_unit_mass"]["mean"] is not None
    return 0 if known else INCONCLUSIVE


class _Source:
    """Profiles of paths: read where the path is a profile, replayed where it is a checkpoint."""

    def __init__(
        self,
        model: str | None,
        arguments: dict[str, Any],
        probe: Path | None,
        blocks: str | None,
        samples: int,
        seed: int,
        device: str,
        trust_pickle: bool,
    ) -> None:
        self._model, self._probe = model, probe
        self._options: dict[str, Any] = {
            "arguments": arguments,
            "blocks": blocks,
            "samples": samples,
            "seed": seed,
            "device": device,
            "trust_pickle": trust_pickle,
        }
        self._subject: Subject | None = None

    def profile(self, path: Path) -> ModelProfile:
        from rksp_core.profile import ModelProfile

        if not path.exists():
            raise ExpiredCheckpoint(f"there is no profile or checkpoint {path}")
        if path.suffix in (".json", ".npz"):
            return ModelProfile.load(path)
        from rksp_core.device import choose_device
        from rksp_monitor.memory import memory_limit

        lower = "lower --samples, or make a --probe of fewer or shorter sequences; the model itself must fit"
        with memory_limit(choose_device(self._options["device"]), lower):
            if self._subject is None:
                self._subject = self._build(path)
            with progress_bar() as progress:
                profile = self._subject.profile(path, progress)
            for note in self._subject.notes:
                print(f"rksp: {note}", file=sys.stderr)
            return profile

    def _build(self, path: Path) -> Subject:
        """Build what the path is replayed with; a checkpoint in a run folder knows its model and probe."""
        from rksp_monitor.checkpoints import configuration_of
        from rksp_monitor.run import CONFIG, PROBE
        from rksp_monitor.subject import Subject, SubjectSettings

        above = path.absolute().parents[:2]
        trainers = next((folder / CONFIG for folder in above if (folder / CONFIG).is_file()), None)
        config = trainers or configuration_of(path)
        own_probe = next((folder / PROBE for folder in above if (folder / PROBE).is_file()), None)
        model = self._model or (str(config) if config else None)
        if model is None:
            raise ModelError(f"nothing says which model {path} belongs to; give --model")
        probe = self._probe or own_probe
        if probe is None:
            print("rksp: no probe given, profiling on seeded random tokens", file=sys.stderr)
        return Subject(SubjectSettings(model=model, probe=None if probe is None else str(probe), **self._options))


def _title(path: Path, profile: ModelProfile) -> str:
    step = "" if profile.step is None else f" (step {profile.step})"
    return f"{path}{step}, probe {str(profile.probe.get('sha256'))[:12]}"
