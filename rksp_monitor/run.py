"""What a run folder says about its run: name, model, probe, control folder; settings override each."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rksp_core.errors import ConfigError
from rksp_monitor.checkpoints.names import is_candidate, step_in
from rksp_monitor.config import RunSettings
from rksp_monitor.filesystem import is_remote
from rksp_monitor.remote import driver_errors, is_local
from rksp_monitor.subject import SubjectSettings

CONFIG = "config.yaml"
PROBE = "probe.safetensors"
LARGEST_PROBE = 2**30  # bytes that are fetched from a remote run folder


@dataclass(frozen=True)
class Run:
    """One run. ``model`` is None when nothing says how to build it, ``probe`` when random tokens serve.

    ``control`` is None when orders have nowhere to go: a remote run without a control folder in its settings.
    """

    name: str
    folder: Path
    model: str | None
    probe: Path | None
    control: Path | None
    ledger: Path


def describe_run(folder: Path, settings: RunSettings, state_dir: Path | None = None) -> Run:
    """Put together what the settings and the trainer's own configuration say.

    Parameters
    ----------
    folder
        The run folder, local or remote; it may lie on a network file system.
    settings
        Of this run.
    state_dir
        Where ledgers lie; None is ``.rksp`` in the run folder where that is a local disk, else the user's state folder.

    Raises
    ------
    ConfigError
        When the probe that the settings name is not there, or the trainer's configuration may not be read.
    OSError
        When the folder cannot be looked at for now.
    """
    with driver_errors(folder):
        return _described(folder, settings, state_dir)


def _described(folder: Path, settings: RunSettings, state_dir: Path | None) -> Run:
    trainer = _trainer_config(folder)
    section = trainer.get("control")
    stated = section.get("folder") if isinstance(section, dict) else None
    local = is_local(folder)
    name = settings.run_id or str(trainer.get("run_id") or (folder.resolve().name if local else folder.name))
    if settings.probe is not None and not settings.probe.is_file():
        raise ConfigError(f"there is no probe {settings.probe}; make one with `rksp probe make`")
    ledger = _ledger(name, folder, state_dir)
    model = settings.model or _own_model(folder, trainer, ledger)
    own_probe = _local(folder / PROBE, ledger) if settings.probe is None and (folder / PROBE).is_file() else None
    control = settings.control.folder or (Path(stated) if stated else folder / "control" if local else None)
    return Run(name, folder, model, settings.probe or own_probe, control, ledger)


def state_folder() -> Path:
    """Return the folder for state that belongs to no run folder: what systemd names, else the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "rksp"


def _own_model(folder: Path, trainer: dict[str, Any], ledger: Path) -> str | None:
    """Return the model that the folder itself names: the trainer's YAML, or a Hugging Face checkpoint's config.json."""
    if isinstance(trainer.get("model"), dict):
        return str(_local(folder / CONFIG, ledger))
    try:
        folders = [path for path in folder.iterdir() if is_candidate(path.name) and step_in(path.name) is not None]
        configs = [path / "config.json" for path in folders if (path / "config.json").is_file()]
    except OSError:
        return None
    # The first one: later ones may still be in the writing, and all of a run are the same.
    first = min(configs, key=lambda path: step_in(path.parent.name) or 0, default=None)
    return None if first is None else str(_local(first, ledger))


def identity_of(subject: SubjectSettings | None) -> str:
    """Name what the checkpoints of a run are replayed with; a configuration in a checkpoint counts by its content."""
    if subject is None:
        return "none"
    path = Path(subject.model)
    if path.name == "config.json" and path.is_file():
        subject = dataclasses.replace(subject, model=hashlib.sha256(path.read_bytes()).hexdigest())
    return subject.identity


def _local(path: Path, ledger: Path) -> Path:
    """Return a local path of a small file: the file itself, or a copy beside the ledger of a remote one."""
    if is_local(path):
        return path
    if path.stat().st_size > LARGEST_PROBE:
        raise ConfigError(f"{path} is larger than {LARGEST_PROBE >> 20} MiB; give a local file in the settings")
    copy = ledger.with_suffix(f".{path.name}")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    return copy


def _ledger(name: str, folder: Path, state_dir: Path | None) -> Path:
    """Return the ledger's path; in a state folder that runs share, the run folder's own path is part of its name."""
    if state_dir is None and not is_remote(folder):
        return folder / ".rksp" / f"{_safe(name)}.sqlite3"
    place = str(folder.resolve()) if is_local(folder) else str(folder)
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    return (state_dir or state_folder()) / f"{_safe(name)}-{digest}.sqlite3"


def _trainer_config(folder: Path) -> dict[str, Any]:
    """Read the trainer's YAML; one that is not there, or of another kind, says nothing.

    One that may not be read is an error: under a guessed name the run would get another ledger, and orders that its
    trainer ignores.
    """
    path = folder / CONFIG
    try:
        with driver_errors(path):
            content = path.read_bytes()
        document = yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror or error}); it names the run and its model"
        ) from error
    return document if isinstance(document, dict) else {}


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
