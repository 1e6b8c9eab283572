"""What a run folder says about its run: name, model, probe, control folder; settings override each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rksp_core.errors import ConfigError
from rksp_monitor.config import WatchSettings

CONFIG = "config.yaml"
PROBE = "probe.safetensors"


@dataclass(frozen=True)
class Run:
    """One run. ``model`` is None when nothing says how to build it, ``probe`` when random tokens serve."""

    name: str
    folder: Path
    model: str | None
    probe: Path | None
    control: Path
    ledger: Path


def describe_run(folder: Path, settings: WatchSettings) -> Run:
    """Put together what the settings and the trainer's own configuration say.

    Raises
    ------
    ConfigError
        When the probe that the settings name is not there, or the trainer's configuration may not be read.
    """
    trainer = _trainer_config(folder)
    section = trainer.get("control")
    stated = section.get("folder") if isinstance(section, dict) else None
    name = settings.run_id or str(trainer.get("run_id") or folder.resolve().name)
    if settings.probe is not None and not settings.probe.is_file():
        raise ConfigError(f"there is no probe {settings.probe}; make one with `rksp probe make`")
    own_probe = folder / PROBE if (folder / PROBE).is_file() else None
    model = settings.model or (str(folder / CONFIG) if isinstance(trainer.get("model"), dict) else None)
    control = settings.control.folder or (Path(stated) if stated else folder / "control")
    return Run(name, folder, model, settings.probe or own_probe, control, _ledger(name, folder, settings.state_dir))


def _ledger(name: str, folder: Path, state_dir: Path | None) -> Path:
    """Return the ledger's path; in a state folder that runs share, the run folder's own path is part of its name."""
    if state_dir is None:
        return folder / ".rksp" / f"{_safe(name)}.sqlite3"
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return state_dir / f"{_safe(name)}-{place}.sqlite3"


def _trainer_config(folder: Path) -> dict[str, Any]:
    """Read the trainer's YAML; one that is not there, or of another kind, says nothing.

    One that may not be read is an error: under a guessed name the run would get another ledger, and orders that its
    trainer ignores.
    """
    path = folder / CONFIG
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); it names the run and its model") from error
    return document if isinstance(document, dict) else {}


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
