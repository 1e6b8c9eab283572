"""Which runs a sweep consists of, and which part each belongs to: decided, and written down, before the first one.

The split is by configuration, never by run, so that no part holds a twin of a run of another part: all seeds of a
configuration share its part, and two groups may not hold the same configuration.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.config import Config, parse_config
from training.experiments.faults import PREFIX, Fault, fault_of
from training.experiments.spec import PARTS, Draw, Group, Part, Spec
from training.run_folder import flat

SCHEMA = "rksp.sweep_plan/1"

# What changes no figure of a run, and so does not tell two configurations apart.
_FREE = {"run_id", "output", "seed", "device", "threads", "print_every", "checkpoint", "profile", "control", "metrics"}
# Came after plans were made: left out where they are off, so that a run keeps its key.
_LATER = {"stabilizers.surprise"}


@dataclass(frozen=True)
class PlannedRun:
    """One run: ``settings`` are what its group gives, by dotted key; ``key`` names it in this sweep."""

    key: str
    group: str
    part: Part
    seed: int
    settings: Mapping[str, Any]

    def config(self, spec: Spec, device: str = "cpu") -> Config:
        """Return the trainer's configuration of this run; nothing is ever written below its ``output``."""
        return _config(spec, self.group, {**self.settings, "seed": self.seed, "device": device})

    @property
    def fault(self) -> Fault | None:
        """What goes wrong in it on purpose."""
        return fault_of(self.settings)


def configuration(config: Config, fault: Fault | None = None) -> dict[str, Any]:
    """Return what tells two configurations apart, by dotted key, every default filled in."""
    found = flat(config.model_dump(mode="json", exclude=_FREE))
    found = {name: value for name, value in found.items() if name not in _LATER or value is not None}
    return found if fault is None else found | flat({"fault": fault.model_dump(mode="json")})


def plan(spec: Spec) -> list[PlannedRun]:
    """Return all runs of a sweep, in an order of which every beginning is a sample of the whole.

    Within a stratum (the configurations that agree in ``split.stratify``) the configurations are sorted by the SHA-256
    of their content, which orders them at random, and dealt out to the parts by their shares. A seed is drawn from
    its part's range by the same hash.

    Raises
    ------
    ConfigError
        When a configuration is none that the trainer takes, or comes twice.
    """
    found: dict[str, tuple[Group, dict[str, Any]]] = {}
    strata: dict[str, list[str]] = defaultdict(list)
    for group in spec.groups:
        for settings in _draws(spec, group):
            content = configuration(_config(spec, group.name, settings), fault_of(settings))
            digest = _sha256(content)
            if digest in found:
                raise ConfigError(
                    f"groups {found[digest][0].name!r} and {group.name!r} hold the same configuration ({settings}); "
                    "leave it out of one, as a twin may not be in two parts"
                )
            found[digest] = group, settings
            strata[_sha256([content.get(key) for key in spec.split.stratify])].append(digest)
    runs = []
    for digests in strata.values():
        for digest, part in zip(sorted(digests), _dealt(len(digests), spec.split.shares), strict=True):
            group, settings = found[digest]
            runs += [
                PlannedRun(f"{part}-{digest[:12]}-{seed}", group.name, part, seed, settings)
                for seed in _seeds(spec, part, digest)
            ]
    return sorted(runs, key=lambda run: _sha256(run.key))


def write_plan(path: Path, spec: Spec, runs: list[PlannedRun]) -> None:
    """Write the plan, or make sure that the one that is there is this one.

    Raises
    ------
    ConfigError
        When another plan is there, or it cannot be written.
    """
    document = {
        "schema": SCHEMA,
        "name": spec.name,
        "base": spec.base,
        "measure": spec.measure.model_dump(mode="json"),
        "runs": [asdict(run) for run in runs],
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    try:
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
                raise ConfigError(
                    f"{path} is the plan of another spec than {spec.name!r} is now; "
                    "give another --folder, or the spec that it was made from"
                )
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read or write the plan {path} ({error}); give another --folder") from error


def assemble(base: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> Config:
    """Return a configuration: the base with settings by dotted key; ``source`` names them in a message.

    Raises
    ------
    ConfigError
        When it is none that the trainer takes.
    """
    document = {"output": "nowhere", "threads": 1} | json.loads(json.dumps(base))
    for key, value in settings.items():
        if key.startswith(PREFIX):
            continue
        *folders, name = key.split(".")
        place = document
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {key} lies below {folder!r}, which is a single value")
        place[name] = value
    return parse_config(document, source)


def _config(spec: Spec, group: str, settings: Mapping[str, Any]) -> Config:
    given = {"output": "nowhere", "threads": 1, "run_id": spec.name}  # whatever the base says
    return assemble(spec.base, {**settings, **given}, f"group {group!r}")


def _draws(spec: Spec, group: Group) -> Iterator[dict[str, Any]]:
    """Yield the settings of each configuration: the grid's points, each with its share of the draws."""
    points = [dict(zip(group.grid, values, strict=True)) for values in itertools.product(*group.grid.values())]
    count, draws = len(points), {}
    if group.sample is not None:
        count, draws = group.sample.count, spec.draw | group.sample.draw
    given = {*group.settings, *group.grid}
    columns = {key: _column(draw, count, group.name, key) for key, draw in draws.items() if key not in given}
    for index in range(count):
        yield {**group.settings, **points[index % len(points)]} | {key: each[index] for key, each in columns.items()}


def _column(draw: Draw, count: int, *names: str) -> list[Any]:
    """Return ``count`` draws, one from each of as many equal shares, in random order; a function of the names."""
    random = np.random.default_rng(int(_sha256(names), 16))
    shares = (random.permutation(count) + random.random(count)) / count
    return [draw.at(float(share)) for share in shares]


def _dealt(count: int, shares: tuple[float, ...]) -> list[Part]:
    """Return one part for each of ``count`` configurations, in blocks as large as the shares say."""
    bounds = [round(count * bound) for bound in itertools.accumulate(shares)]
    sizes = [last - first for first, last in itertools.pairwise([0, *bounds])]
    return [part for part, size in zip(PARTS, sizes, strict=True) for _ in range(size)]


def _seeds(spec: Spec, part: Part, digest: str) -> list[int]:
    first, last = spec.seeds.of(part)
    random = np.random.default_rng(int(digest, 16))
    return [first + int(each) for each in random.choice(last - first + 1, size=spec.seeds.each, replace=False)]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
