"""The schema of a trainer's YAML, and how it is read: defaults, then the file, then ``--set key=value``.

Every section forbids unknown keys; a mistake becomes one sentence that names the key, its value and what is expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rksp_core.errors import ConfigError
from training.names import unknown_key

Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    """A factory ``package.module:name`` and its keyword arguments; it returns a `torch.nn.Module`."""

    factory: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    arguments: dict[str, Any] = Field(default_factory=dict)


class Task(Section):
    """Associative recall; ``batch`` is the size over all processes, vocabulary and length default to the model's."""

    name: Literal["associative_recall"] = "associative_recall"
    batch: Count = 32
    pairs: Count = 4
    vocabulary: Count
    length: Count


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2019); weight decay falls on matrices only."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.01


class Schedule(Section):
    """A linear warm-up over ``warmup`` steps, then ``constant`` or ``cosine`` down to ``floor`` times the rate."""

    name: Literal["constant", "cosine"] = "constant"
    warmup: Whole = 100
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1


class KSS(Section):
    """Koopman spectral shaping (Kim et al. 2026, Eq. 14-15); alpha 0 is off until an order switches it on."""

    alpha: NotNegative = 0.0
    interval: Count = 10
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.4
    variant: Literal["paper", "hinge"] = "paper"


class Checkpoint(Section):
    """A checkpoint every so many steps (0: none), the newest ``keep_last`` of them kept (null: all)."""

    every: Whole = 100
    keep_last: Count | None = None


class Profile(Section):
    """A profile of the fixed probe every so many steps (0: none)."""

    every: Whole = 0
    samples: Count = 2048
    sequences: Count = 32


class Control(Section):
    """Where orders come from (null: ``<output>/control``), read every so many steps."""

    folder: str | None = None
    every: Count = 1


class Config(Section):
    """One run."""

    run_id: str = Field(min_length=1)
    output: str = Field(min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    steps: Count = 1000
    device: str = "auto"
    threads: Count = 1
    print_every: Count = 10
    clip: Positive | None = None
    model: Model
    task: Task
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    kss: KSS = KSS()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()
    control: Control = Control()

    @model_validator(mode="before")
    @classmethod
    def _task_fits_the_model(cls, values: Any) -> Any:
        """Vocabulary and length are written once: the task takes them from the model's arguments."""
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values
        arguments, task = values["model"].get("arguments"), values.get("task", {})
        if not isinstance(arguments, dict) or not isinstance(task, dict):
            return values
        shared = {name: arguments[name] for name in ("vocabulary", "length") if name in arguments}
        return {**values, "task": {**shared, **task}}

    @model_validator(mode="after")
    def _model_can_take_the_task(self) -> Config:
        for name, wanted in (("vocabulary", self.task.vocabulary), ("length", self.task.length)):
            limit = self.model.arguments.get(name)
            if isinstance(limit, int) and wanted > limit:
                raise ValueError(f"task.{name} = {wanted} is more than the model's {limit}")
        return self

    @property
    def control_folder(self) -> Path:
        """Where orders and acknowledgements lie."""
        return Path(self.control.folder) if self.control.folder else Path(self.output) / "control"


def read_config(path: Path, changes: Iterable[str] = ()) -> Config:
    """Read a configuration and apply ``key=value`` changes, e.g. ``optimizer.learning_rate=0.01``.

    ``run_id`` defaults to the file's name and ``output`` to ``runs/<run_id>``.

    Raises
    ------
    ConfigError
        When the file cannot be read, a key is unknown or a value is out of its range.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"cannot read {path} ({reason}); give the path of a trainer's YAML file") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(document).__name__}")
    for change in changes:
        _set(document, change)
    document.setdefault("run_id", path.stem)
    document.setdefault("output", f"runs/{document['run_id']}")
    return parse_config(document, str(path))


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
        raise ConfigError(f"{source}: {_sentence(error)}") from error


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


def _sentence(error: ValidationError) -> str:
    """Put one of pydantic's findings into a sentence; an unknown key is often the cause of a missing one."""
    findings = error.errors(include_url=False)
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *section, key = first["loc"]
        return unknown_key(".".join(map(str, section)), key, _known_keys(section))
    if first["type"] == "missing":
        hint = "; give it, or name it among model.arguments" if where in ("task.vocabulary", "task.length") else ""
        return f"the key {where!r} is missing{hint}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].replace("Input should", "it should")
    return f"{where} cannot be {first['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(location: Iterable[int | str]) -> list[str]:
    section: Any = Config
    for name in location:
        section = section.model_fields[str(name)].annotation
    return list(section.model_fields)
