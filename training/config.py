"""The schema of a trainer's YAML, and how it is read: defaults, then the file, then ``--set key=value``.

Every section forbids unknown keys; a mistake becomes one sentence that names the key, its value and what is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from rksp_core.errors import ConfigError
from rksp_core.orders import VARIANTS, Variant
from training.schema.mistakes import section_named, sentence
from training.schema.optimizer import AdamW, Optimizer
from training.schema.section import Count, NotNegative, Section, Whole
from training.schema.stabilizers import Stabilizers
from training.schema.task import AssociativeRecall, Task

Range = tuple[NotNegative, NotNegative]
WholeRange = tuple[Count, Count]

# The section that a mapping without a ``name`` is.
DEFAULT_NAMES = {"task": AssociativeRecall, "optimizer": AdamW}


class Model(Section):
    """A factory ``package.module:name`` and its keyword arguments; it returns a `torch.nn.Module`."""

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    arguments: dict[str, Any] = Field(default_factory=dict)


class Schedule(Section):
    """A linear warm-up over ``warmup`` steps, then ``constant`` or ``cosine`` down to ``floor`` times the rate."""

    name: Literal["constant", "cosine"] = "constant"
    warmup: Whole = 100
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1


class KSS(Section):
    """Koopman spectral shaping (Kim et al. 2026, Eq. 14-15); alpha 0 is off until an order switches it on.

    ``rank`` and ``samples``: r modes from at most N token states; ``beta`` weighs the near-unit term.
    """

    alpha: NotNegative = 0.0
    interval: Count = 10
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.4
    variant: Variant = "paper"
    rank: Count = 32
    samples: Annotated[int, Field(ge=2, strict=True)] = 2048
    beta: NotNegative = 1.0


class Checkpoint(Section):
    """A checkpoint every so many steps (0: none).

    ``format``: ``safetensors`` or ``pt`` hold whole weights; ``dcp`` (`torch.distributed.checkpoint`) is written by all
    processes, each its shard, and ``asynchronous`` ly beside the training if wanted. Kept are the newest ``keep_last``
    (null: all) and every one whose step is a multiple of ``keep_every``.
    """

    every: Whole = 100
    format: Literal["safetensors", "pt", "dcp"] = "safetensors"
    asynchronous: bool = False
    keep_last: Count | None = None
    keep_every: Count | None = None

    @model_validator(mode="after")
    def _only_dcp_is_asynchronous(self) -> Checkpoint:
        if self.asynchronous and self.format != "dcp":
            raise ValueError(f"checkpoint.asynchronous needs checkpoint.format: dcp, got {self.format}")
        return self


class Profile(Section):
    """A profile of the fixed probe every so many steps (0: none)."""

    every: Whole = 0
    samples: Count = 2048
    sequences: Count = 32


class Limits(Section):
    """What an order may set, [least, most]; one outside is rejected. The levers beside KSS null: not at all.

    ``rollbacks``: how often orders may take the run back to a checkpoint in all.
    """

    alpha: Range = (0.0, 1.0)
    interval: WholeRange = (1, 1000)
    layer_fraction: Range = (0.01, 1.0)
    gamma: Range = (0.0, 1.0)
    variants: tuple[Variant, ...] = VARIANTS
    clip: Range | None = (0.01, 100.0)
    learning_rate_scale: Range | None = (0.01, 1.0)
    surprise: Range | None = (0.01, 100.0)
    rollbacks: Whole = 3

    @model_validator(mode="after")
    def _least_before_most(self) -> Limits:
        for name, bounds in self:
            if name not in ("variants", "rollbacks") and bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"control.limits.{name} must be [least, most], got {list(bounds)}")
        return self


class Control(Section):
    """Where orders come from (null: ``<output>/control``), read every so many steps, and what they may ask for.

    ``wait_at_divergence``: seconds that a run which diverged waits for an order to go back (0: it ends at once).
    ``skip_batches``: whether the batches of the stretch that is undone are left out, or seen again.
    """

    folder: str | None = None
    every: Count = 1
    wait_at_divergence: NotNegative = 0.0
    skip_batches: bool = True
    limits: Limits = Limits()


class Prometheus(Section):
    """Serve the figures of the last step at ``http://address:port/metrics``."""

    address: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 9110


class WandB(Section):
    """Weights and Biases; ``offline`` writes below the run folder and sends nothing."""

    project: str = "rksp"
    mode: Literal["offline", "online"] = "offline"


class Metrics(Section):
    """Where the figures of each step go beside ``metrics.jsonl``.

    ``kss_ratio_every``: at every so many KSS terms the norm of its gradient is measured beside that of the task (0:
    never); it costs one more backward pass.
    """

    kss_ratio_every: Whole = 10
    prometheus: Prometheus | None = None
    tensorboard: bool = False
    wandb: WandB | None = None


class Config(Section):
    """One run.

    ``precision``: ``bfloat16`` computes forward passes in it (autocast) and keeps weights in float32. ``accumulation``:
    micro-batches a step. ``parallel``: how several processes of ``torchrun`` share the work; one process needs neither.
    """

    run_id: str = Field(min_length=1)
    output: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    steps: Count = 1000
    device: str = "auto"
    threads: Count = 1
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    accumulation: Count = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    print_every: Count = 10
    model: Model
    task: Task
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    stabilizers: Stabilizers = Stabilizers()
    kss: KSS = KSS()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()
    control: Control = Control()
    metrics: Metrics = Metrics()

    @model_validator(mode="before")
    @classmethod
    def _said_once(cls, values: Any) -> Any:
        """Give task and optimizer their default names, and the task what the model's arguments say already."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for section, default in DEFAULT_NAMES.items():
            given = values.get(section, {})
            if isinstance(given, dict) and "name" not in given:
                values[section] = {"name": default.model_fields["name"].default, **given}
        model, task = values.get("model"), values.get("task")
        arguments = model.get("arguments") if isinstance(model, dict) else None
        if isinstance(arguments, dict) and isinstance(task, dict):
            shared = getattr(section_named(Task, task.get("name")), "shared", ())
            values["task"] = {name: arguments[name] for name in shared if name in arguments} | task
        return values

    @model_validator(mode="after")
    def _model_can_take_the_task(self) -> Config:
        for name in self.task.shared:
            limit, wanted = self.model.arguments.get(name), getattr(self.task, name)
            if isinstance(limit, int) and isinstance(wanted, int) and wanted > limit:
                raise ValueError(f"task.{name} = {wanted} is more than the model's {limit}")
        return self

    @model_validator(mode="after")
    def _shards_can_be_had(self) -> Config:
        """FSDP2 replaces parameters by shards, which neither parametrizations nor second derivatives take."""
        names = ("spectral_norm", "weight_norm", "gradient_penalty", "jacobian")
        for name in names if self.parallel == "fsdp" else ():
            if getattr(self.stabilizers, name) is not None:
                raise ValueError(f"stabilizers.{name} cannot be had with parallel: fsdp; choose parallel: ddp")
        return self

    @model_validator(mode="after")
    def _surprise_needs_second_moments(self) -> Config:
        if self.stabilizers.surprise is not None and self.optimizer.name != "adamw":
            raise ValueError(
                f"stabilizers.surprise needs the second moments of optimizer.name: adamw, got {self.optimizer.name}; "
                "use stabilizers.clip"
            )
        return self

    @property
    def control_folder(self) -> Path:
        """Where orders and acknowledgements lie."""
        return Path(self.control.folder) if self.control.folder else Path(self.output) / "control"


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's own loader takes the last of several values of a key without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_config(path: Path, changes: Iterable[str] = ()) -> Config:
    """Read a configuration and apply ``key=value`` changes, e.g. ``optimizer.learning_rate=0.01``.

    ``run_id`` defaults to the file's name and ``output`` to ``runs/<run_id>``.

    Raises
    ------
    ConfigError
        When the file cannot be read, a key is unknown or a value is out of its range.
    """
    document = read_document(path)
    for change in changes:
        _set(document, change)
    document.setdefault("run_id", path.stem)
    document.setdefault("output", f"runs/{document['run_id']}")
    return parse_config(document, str(path))


def read_document(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises
    ------
    ConfigError
        When it cannot be read, or gives a key twice.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)  # noqa: S506 - it is a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"cannot read {path} ({reason}); give the path of a trainer's YAML file") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(document).__name__}")
    return document


def parse_config(document: Mapping[str, Any], source: str) -> Config:
    """Validate a mapping; ``source`` names it in the message.

    Raises
    ------
    ConfigError
        One sentence about the first mistake.
    """
    try:
        return Config.model_validate(dict(document))
    except ValidationError as error:
        raise ConfigError(f"{source}: {sentence(error, Config)}") from error


def _set(document: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, for instance optimizer.learning_rate=0.01, got {change!r}")
    *folders, name = key.split(".")
    place = document
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {change}: {folder!r} is a single value and has no key {name!r}")
    try:
        place[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not valid YAML; quote it") from error
