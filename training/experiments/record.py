"""The record of a run (schema "rksp.run_record/1"), and the folder of a sweep's records.

    schema, sweep, key, group, part, seed
    configuration   {dotted key: value}, every default filled in (`training.experiments.plan.configuration`); what goes
                    wrong on purpose below ``fault`` (`training.experiments.faults`)
    environment     device, processor count of the run (1), versions of Python, torch and numpy
    parameters      how many the model has
    chance_loss     of guessing, in nats
    initial         ``features`` and, layer by layer, ``layers`` of the profile before the first step
    look_ahead      a list, one entry for each K: `training.experiments.one_run`
    steps           ``loss`` and ``gradient_norm`` (before clipping) of steps 1, 2, ..: one list each
    profiles        ``step``, ``features`` (`rksp_core.features.FEATURES`), ``distances`` to the previous and to the
                    first profile, ``indicators`` (`training.experiments.indicators`): one list each
    sharpness       ``step``, ``largest``, ``smallest``: `training.experiments.sharpness`
    labels          ``paper`` and ``rksp``: the step at which each held first, or null (`training.labels`)
    onset           the step at which the divergence began, or null (`training.experiments.onset`)
    horizon         steps that the run was to make; ``step``: updates that it made
    status          finished | diverged
    final           held-out ``loss`` and ``accuracy``; of a diverged run those of its last state before
    learned         whether it finished with a held-out loss of at most half of chance
    seconds         ``training``, ``measuring`` (profiles, indicators, sharpness) and ``look_ahead``

Numbers have four significant digits, which is more than another probe or seed leaves of them; null is not finite, or
not known.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError

SCHEMA = "rksp.run_record/1"
PACKED = "records.jsonl.gz"
Record = dict[str, Any]


def compact(value: float | None) -> float | None:
    """Return a number with four significant digits; None when it is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def compact_all(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return each number as `compact` does."""
    return {name: compact(value) for name, value in values.items()}


class Records:
    """The records below a sweep's folder: one file a run in ``records/``, or all in one packed file, or both.

    A packed file can travel where hundreds of small ones cannot, and a sweep goes on from it as well. Another
    experiment's records have another ``schema``.
    """

    def __init__(self, folder: Path, schema: str = SCHEMA) -> None:
        self._folder, self._packed, self._schema = folder / "records", folder / PACKED, schema

    def keys(self) -> set[str]:
        """Return the keys of the runs that have a record."""
        return {path.stem for path in self._folder.glob("*.json")} | {record["key"] for record in self._read_packed()}

    def write(self, record: Record) -> None:
        """Write one record, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
        write_atomic(self._folder / f"{record['key']}.json", text + "\n")

    def pack(self) -> Path:
        """Bring all records into the packed file, sorted by key, and return its path.

        The same records give the same bytes, so a packed file can be compared and versioned.
        """
        lines = {record["key"]: record for record in self}
        text = "".join(json.dumps(lines[key], allow_nan=False, separators=(",", ":")) + "\n" for key in sorted(lines))
        write_atomic(self._packed, gzip.compress(text.encode(), mtime=0))
        return self._packed

    def __iter__(self) -> Iterator[Record]:
        """Yield all records; one that is in both places comes once, from its own file."""
        seen = set()
        for path in sorted(self._folder.glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            seen.add(record["key"])
            yield record
        yield from (record for record in self._read_packed() if record["key"] not in seen)

    def _read_packed(self) -> Iterable[Record]:
        return read_records(self._packed, self._schema) if self._packed.exists() else ()


def read_records(path: Path, schema: str = SCHEMA) -> Iterator[Record]:
    """Yield the records of a packed file, or of a sweep's folder.

    Raises
    ------
    ConfigError
        When it cannot be read, or holds something else.
    """
    if path.is_dir():
        yield from Records(path, schema)
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                record = json.loads(line)
                if record.get("schema") != schema:
                    raise ConfigError(
                        f"{path} holds {record.get('schema')!r}, expected {schema!r}; give a sweep's records"
                    )
                yield record
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(
            f"cannot read the records {path} ({error}); pack them again from the sweep's folder"
        ) from error
