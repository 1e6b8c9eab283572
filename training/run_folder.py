"""The folder of one run, and whether a run may start or continue in it.

config.yaml        the configuration, defaults filled in
metrics.jsonl      one line a step
checkpoints/       `training.checkpoint`
profiles/          `rksp_core.ProfileWriter`
control/           `rksp_core.control` (unless ``control.folder`` says otherwise)
probe.safetensors  the batch that profiles are taken on
rollbacks.json     how often and where the run went back to a checkpoint, if it did (`training.rollback`)
result.json        how the run ended: status, both divergence labels, horizon, final figures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.checkpoint import checkpoints
from training.config import Config, parse_config
from training.run import Rollback


def open_folder(config: Config, *, resume: bool) -> None:
    """Make sure that the run may start or continue in its folder, and write the configuration there.

    ``resume`` in a folder without a run starts from the beginning, so a scheduler can always pass it.

    Raises
    ------
    ConfigError
        When the folder holds a run and ``resume`` is False, holds a run of another configuration, or it or the
        control folder cannot be written.
    """
    folder = Path(config.output)
    stored = folder / "config.yaml"
    if stored.exists():
        if not resume:
            raise ConfigError(f"{folder} already holds a run; pass --resume to continue it, or change output")
        _refuse_another(config, stored)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_control_folder(config.control_folder)
        # last: it says that the folder holds a run
        write_atomic(stored, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"cannot write to the run folder {folder} ({error.strerror}); change output") from error


def _make_control_folder(control: Path) -> None:
    try:
        control.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the control folder {control} ({error.strerror}); change control.folder"
        ) from error


def newest_checkpoint(config: Config) -> Path | None:
    """Return the checkpoint to resume from, or None where there is none yet."""
    return next(reversed(checkpoints(Path(config.output) / "checkpoints")), None)


def write_rollbacks(config: Config, rollbacks: Sequence[Rollback]) -> None:
    """Keep where the run went back; a run that is resumed from any checkpoint that is left goes on with it."""
    text = json.dumps([asdict(rollback) for rollback in rollbacks], indent=1)
    write_atomic(Path(config.output) / "rollbacks.json", text + "\n")


def read_rollbacks(config: Config) -> list[Rollback]:
    """Return what `write_rollbacks` kept, in order.

    Raises
    ------
    ConfigError
        When it cannot be read.
    """
    path = Path(config.output) / "rollbacks.json"
    try:
        return [Rollback(**document) for document in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {path} ({error}), so the run cannot be resumed; change output") from error


def write_probe(folder: Path, batch: dict[str, Tensor]) -> None:
    """Write the probe batch, its tensors named as the model's forward calls them, as a file that `rksp` reads."""
    write_atomic(folder / "probe.safetensors", save(batch))


def _refuse_another(config: Config, stored: Path) -> None:
    """A resumed run goes on with what it began with; only what changes no figure of it may be another."""
    began = _read(stored)
    free = {"output", "print_every", "checkpoint", "control", "metrics"}
    if config.schedule.name == "constant":
        free.add("steps")
    now, then = (flat(each.model_dump(mode="json", exclude=free)) for each in (config, began))
    changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{stored.parent} was begun with {key} = {then.get(key)!r}, got {now.get(key)!r}; "
            "resume with the same configuration, or change output"
        )


def _read(path: Path) -> Config:
    try:
        return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}, so the run cannot be resumed; change output") from error


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"optimizer.learning_rate": 0.001, ...}."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
