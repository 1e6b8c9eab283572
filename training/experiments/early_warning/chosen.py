"""The file of chosen rules (schema "rksp.warning_rules/1"): sets of rules, and the runs that they were chosen on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.experiments.early_warning.rules import Rule

SCHEMA = "rksp.warning_rules/1"


@dataclass(frozen=True)
class Chosen:
    """``sets``: by what a watcher has to see, rules of which any gives the alarm.

    ``keys`` and ``runs`` ({kind: how many}) tell what they were chosen on.
    """

    part: str
    keys: tuple[str, ...]
    runs: Mapping[str, int]
    sets: Mapping[str, tuple[Rule, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        sets = {name: [rule.to_dict() for rule in rules] for name, rules in self.sets.items()}
        made = "python -m training.experiments.early_warning FOLDER --choose FILE.json"
        chosen_on = {"part": self.part, "runs": dict(self.runs), "keys": list(self.keys)}
        return {"schema": SCHEMA, "made_by": made, "chosen_on": chosen_on, "sets": sets}


def write_chosen(path: Path, chosen: Chosen) -> None:
    """Write the file, whole or not at all.

    Raises
    ------
    ConfigError
        When it cannot be written.
    """
    try:
        write_atomic(path, json.dumps(chosen.to_dict(), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the rules {path} ({error.strerror}); give another path") from error


def read_chosen(path: Path) -> Chosen:
    """Read the file.

    Raises
    ------
    ConfigError
        When it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"it is a {document['schema']!r}")
        sets = {name: tuple(map(Rule.from_dict, rules)) for name, rules in document["sets"].items()}
        on = document["chosen_on"]
        return Chosen(on["part"], tuple(on["keys"]), on["runs"], sets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {path} as {SCHEMA} ({error}); write one with --choose") from error
