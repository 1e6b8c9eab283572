"""The settings of ``rksp watch``: one schema, filled from flags, RKSP_* variables, a YAML file and defaults.

The first of these wins. A nested setting is ``RKSP_REPLAY__TIMEOUT`` as a variable. A key that is not in the schema
is refused, with the nearest one that is.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from rksp_core.errors import ConfigError, RkspError
from rksp_core.policy import LEVELS, Policy
from rksp_monitor.announce_settings import Hook, Webhook

PREFIX = "RKSP_"
FILE_VARIABLE = "RKSP_CONFIG"
TOLD = {"RKSP_EVENT", "RKSP_RUN"}  # to command hooks, which may call rksp themselves

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the settings."""

    model_config = ConfigDict(frozen=True)


class Replay(Section):
    """How a checkpoint is replayed in a worker process."""

    timeout: Positive = Field(default=600.0, description="Seconds one checkpoint may take before its worker is ended.")
    attempts: Count = Field(default=3, description="Attempts before a checkpoint counts as failed.")
    retry_delay: Positive = Field(
        default=5.0, description="Seconds before the second attempt; doubled for each further one."
    )
    incomplete_after: Positive = Field(
        default=3600.0, description="Seconds after which an unfinished file counts as failed."
    )
    samples: Count = Field(default=2048, description="Token states a layer is profiled on.")
    sequences: Count = Field(default=32, description="Sequences of a random probe.")
    length: Count = Field(default=64, description="Tokens in a sequence of a random probe.")
    micro_batch: Count | None = Field(
        default=None, description="Sequences in one forward pass; null takes all, and fewer when memory runs out."
    )
    cpu_fallback: bool = Field(
        default=True, description="Whether a checkpoint that does not fit the GPU is replayed on the CPU."
    )
    noise_groups: Annotated[int, Field(ge=0)] = Field(
        default=4, description="Groups of sequences that the noise of a profile is measured over; 0 is off."
    )
    noise_every: Count = Field(
        default=10, description="Checkpoints between two measurements of the noise; each costs one profile a group."
    )

    @field_validator("noise_groups")
    @classmethod
    def _groups(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one group says nothing about noise; take at least 2, or 0 for none")
        return value


class Control(Section):
    """Where orders to the trainer go."""

    folder: Path | None = Field(
        default=None, description="Control folder; null takes the trainer's, or RUN_FOLDER/control."
    )
    mode: str = Field(default="0600", pattern="^0?[0-7]{3}$", description="Permission bits of desired.json, in octal.")
    acknowledge_within: Positive = Field(
        default=600.0, description="Seconds after which an order that the trainer did not answer is an alarm."
    )


class Every(Section):
    """Some of the checkpoints."""

    every: Count = Field(description="Steps that must lie between two checkpoints that are judged.")


class Workers(Section):
    """The processes that replay checkpoints, one a device."""

    niceness: Annotated[int, Field(ge=0, le=19)] = Field(default=10, description="Added to a worker's niceness.")
    idle_io: bool = Field(default=True, description="Whether a worker reads only when nobody else does (ionice).")
    threads: Count = Field(default=1, description="Threads of torch in a worker.")
    memory_limit: Positive | None = Field(
        default=None, description="GiB of resident memory above which a worker is started again; null is no limit."
    )


class RunSettings(Section):
    """What each run may have of its own; a key that an entry of ``runs`` leaves out is the top level's."""

    model: str | None = Field(default=None, description="MODEL, as for preflight; null takes RUN_FOLDER/config.yaml.")
    arguments: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the model's factory.")
    probe: Path | None = Field(
        default=None, description="Probe file; null takes RUN_FOLDER/probe.safetensors, else seeded random tokens."
    )
    blocks: str | None = Field(default=None, description="Glob of the residual blocks; null finds them.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of a random probe, the model and the subsampling.")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:n."
    )
    run_id: str | None = Field(
        default=None, description="Name of the run; null takes the trainer's, or the folder's name."
    )
    enforce: bool = Field(default=False, description="Whether to write orders; false only logs and exports them.")
    trust_pickle: bool = Field(
        default=False, description="Whether objects that are no tensors, as DeepSpeed's, are looked past; none is run."
    )
    backlog: Literal["all", "latest"] | Every = Field(
        default="all", description="Checkpoints to judge: all, the latest that wait, or some ({every: STEPS})."
    )
    reference: Path | None = Field(
        default=None, description="A healthy run to compare with at the same step: its folder, ledger or history."
    )
    replay: Replay = Field(default_factory=Replay)
    control: Control = Field(default_factory=Control)
    policy: Policy = Field(default_factory=Policy, description="Rules, hysteresis, cool-down, and what a level orders.")


class RunEntry(RunSettings):
    """One entry of ``runs``."""

    folder: str = Field(description="Run folder, a glob of run folders (/data/runs/*), or a URL (s3://bucket/run).")


class WatchSettings(RunSettings, BaseSettings):
    """Settings of ``rksp watch``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", frozen=True, protected_namespaces=()
    )

    poll_interval: Positive = Field(default=2.0, description="Seconds between two scans; file events shorten the wait.")
    hints: bool = Field(default=True, description="Whether to ask the operating system for file events.")
    listen: str = Field(
        default="127.0.0.1:9109", description="Address of the metrics endpoint; port 0 picks a free one."
    )
    web_config: Path | None = Field(
        default=None, description="TLS and basic auth of the endpoint, in the schema of Prometheus' exporter-toolkit."
    )
    per_layer_metrics: bool = Field(default=False, description="Whether to export the rksp_layer_* series.")
    state_dir: Path | None = Field(
        default=None, description="Local folder of the ledgers; null is RUN_FOLDER/.rksp, or the user's state folder."
    )
    fail_on: Literal["never", "elevated", "high", "critical"] = Field(
        default="never", description="Level of exit code 1."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level of what is logged."
    )
    workers: Workers = Field(default_factory=Workers)
    webhooks: tuple[Webhook, ...] = Field(default=(), description="Addresses that events are posted to.")
    hooks: tuple[Hook, ...] = Field(default=(), description="Commands that are run at events.")
    runs: tuple[RunEntry, ...] = Field(default=(), description="The runs to watch, with what they have of their own.")

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        from rksp_monitor.endpoint import parse_address

        parse_address(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what `read_settings` merged and nothing behind its back."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def read_settings(
    path: Path | None = None, flags: Mapping[str, Any] | None = None, folders: Sequence[str] = ()
) -> WatchSettings:
    """Return the settings; ``flags`` that are None were not given.

    Parameters
    ----------
    path
        YAML file; None takes the one that RKSP_CONFIG names, if any.
    flags
        Values by name, nested as in the YAML; they win over everything else.
    folders
        Run folders beside those under ``runs``.

    Returns
    -------
    WatchSettings
        Each of its ``runs`` is whole: what an entry leaves out was taken from the top level.

    Raises
    ------
    ConfigError
        When the file cannot be read, a key is unknown, or a value is out of its range: one sentence.
    """
    if path is None and os.environ.get(FILE_VARIABLE):
        path = Path(os.environ[FILE_VARIABLE])
    document = {} if path is None else _read_yaml(path)
    source = "the settings" if path is None else str(path)
    _refuse_misspelt_variables()
    try:
        variables = EnvSettingsSource(WatchSettings)()
    except SettingsError as error:
        name = str(error).partition('field "')[2].partition('"')[0]
        raise ConfigError(
            f"the variable {PREFIX}{name.upper()} is no JSON; one of its keys is {PREFIX}{name.upper()}__KEY"
        ) from error
    merged = _merge(_merge(document, variables), _given(flags or {}))
    schema = WatchSettings.model_json_schema()
    for key, near in _unknown_keys(merged, schema, schema):
        if re.fullmatch(r"runs\.\d+\.\w+", key) and (name := key.rpartition(".")[2]) in WatchSettings.model_fields:
            raise ConfigError(f"{source}: {key}: {name} belongs to the top level, as all runs share it")
        raise ConfigError(f"{source}: unknown key {key!r}; did you mean {near!r}? See `rksp config schema`")
    entries = merged.get("runs") or []
    if not isinstance(entries, list):
        raise ConfigError(f"{source}: runs must be a list of {{folder: ...}}, got a {type(entries).__name__}")
    named = [*entries, *({"folder": folder} for folder in folders)]
    over = _merge(variables, _given(flags or {}))  # they win over what an entry says, too
    own = [_merge(_merge(_per_run(document), entry), _per_run(over)) for entry in named if isinstance(entry, Mapping)]
    if len(own) != len(named):
        raise ConfigError(f"{source}: an entry of runs is {{folder: ...}}; see `rksp config init`")
    if len(own) > 1 and over.get("run_id") is not None:
        raise ConfigError("one run_id cannot name several runs; set it in the entries of `runs:`")
    try:
        return WatchSettings(**merged | {"runs": own})
    except ValidationError as error:
        raise ConfigError(f"{_variable(error, flags or {}) or source}: {_sentence(error)}") from error
    except RkspError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_policy(path: Path) -> Policy:
    """Return the policy in a settings file, or in a file that holds nothing else; variables have no say in it.

    Raises
    ------
    ConfigError
        As `read_settings` does.
    """
    document = _read_yaml(path)
    names = {each.name for each in dataclasses.fields(Policy)}
    known = [*names, *WatchSettings.model_fields]  # a misspelt key of a policy is a policy's, too
    bare = "policy" not in document and any(get_close_matches(str(key), known, 1, 0.0)[0] in names for key in document)
    whole, schema = {"policy": document} if bare else document, WatchSettings.model_json_schema()
    for key, near in _unknown_keys(whole, schema, schema):
        raise ConfigError(f"{path}: unknown key {key!r}; did you mean {near!r}? See `rksp config schema`")
    try:
        return WatchSettings.model_validate({"policy": whole.get("policy", {})}).policy
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"cannot read {path} ({reason}); write one with `rksp config init`") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is no YAML{where}: {getattr(error, 'problem', None) or error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got a {type(document).__name__}")
    return document


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _given(value) if isinstance(value, Mapping) else value for name, value in flags.items()}
    return {name: value for name, value in nested.items() if value is not None and value != {}}


def _per_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in RunSettings.model_fields}


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``high`` over ``low``, mapping by mapping."""
    both = dict(low)
    for name, value in high.items():
        under = both.get(name)
        both[name] = _merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return both


def _unknown_keys(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, nearest known path) of keys that the schema does not have; open mappings allow any."""
    for option in (schema, *schema.get("anyOf", ()), *schema.get("allOf", ())):
        part = root["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option
        if isinstance(value, list):
            for index, item in enumerate(value):
                for key, near in _unknown_keys(item, part.get("items", {}), root):
                    yield f"{index}.{key}", f"{index}.{near}"
        if not isinstance(value, Mapping):
            continue
        known, rest = part.get("properties"), part.get("additionalProperties")
        for name, inner in value.items():
            if known is not None and name not in known:
                yield str(name), get_close_matches(str(name), known, 1, 0.0)[0]
                continue
            within = known[name] if known is not None else rest if isinstance(rest, Mapping) else {}
            for key, near in _unknown_keys(inner, within, root):
                yield f"{name}.{key}", f"{name}.{near}"


def _refuse_misspelt_variables() -> None:
    """Refuse a variable that nearly names a setting (RKSP_REPLAY_TIMEOUT); others with the prefix are not ours."""
    known = {PREFIX + name.upper() for name in WatchSettings.model_fields} | {FILE_VARIABLE}
    schema = WatchSettings.model_json_schema()
    sections = {
        name: schema["$defs"].get(part.get("$ref", "").rpartition("/")[2], {})
        for name, part in schema["properties"].items()
    }
    nested = {f"{PREFIX}{name}__{key}".upper() for name, part in sections.items() for key in part.get("properties", {})}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in TOLD and name.partition("__")[0] not in known:
            near = get_close_matches(name, known | nested, 1, 0.85)
            if near:
                raise ConfigError(f"the variable {name} names no setting; did you mean {near[0]}?")


def _variable(error: ValidationError, flags: Mapping[str, Any]) -> str:
    """Return the variable that set what was found first, in words; "" when a flag or the file did."""
    _, parts = _first(error)
    key = parts[2:] if parts[:1] == ["runs"] else parts  # a variable wins over what an entry says
    if key and key[0] in _given(flags):
        return ""
    names = (PREFIX + "__".join(key[:length]).upper() for length in range(len(key), 0, -1))
    return next((f"the variable {name}" for name in names if name in os.environ), "")


def _first(error: ValidationError) -> tuple[ErrorDetails, list[str]]:
    """Return the first finding and its place; where a setting has several forms, of the one that comes nearest."""
    found = error.errors(include_url=False)
    first, place = found[0], found[0]["loc"][:-1]
    if re.search(r"[\[\]]", "".join(map(str, first["loc"][-1:]))):
        first = max((each for each in found if each["loc"][: len(place)] == place), key=lambda each: len(each["loc"]))
    # What pydantic adds to a place: that it is a key, or which form of a setting was tried.
    return first, [str(part) for part in first["loc"] if not re.search(r"[\[\]]|^[A-Z]", str(part))]


def _sentence(error: ValidationError) -> str:
    """Put the first finding into a sentence, with the nearest value where there is a choice."""
    first, parts = _first(error)
    message, given = first["msg"].removeprefix("Value error, "), first["input"]
    near = _nearest_value(first, parts)
    hint = f"did you mean {near}? See" if near else "see"
    where = ".".join(parts) or "a value"
    got = "" if parts[:1] == ["webhooks"] else f", got {given!r}"  # an address may be a secret
    return f"{where}: {message[:1].lower()}{message[1:]}{got}; {hint} `rksp config schema`"


def _nearest_value(finding: ErrorDetails, parts: Sequence[str]) -> str:
    """Return the value that was probably meant, of a choice or of the levels, which are numbers; "" for none."""
    if finding["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", finding["ctx"]["expected"])
        return next((repr(near) for near in get_close_matches(str(finding["input"]), known, 1)), "")
    if finding["type"] == "int_parsing" and (parts[-1] == "level" or "ladder" in parts):
        names = get_close_matches(str(finding["input"]), LEVELS, 1)
        return next((f"{LEVELS.index(name)} ({name})" for name in names), "")
    return ""
