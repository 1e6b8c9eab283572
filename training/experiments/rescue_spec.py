"""The schema of a rescue's YAML: which arms there are, on which runs, and in what step trainer and watcher go.

name: reactive
base: {...}                                      # a training configuration, without output
grid: {optimizer.learning_rate: [0.012, 0.016]}  # every combination
seeds: [7201, 7204]                              # first and last; each arm is run on all of them
lag: 0                                           # steps from a profile to the earliest answer to it
arms:
  - {name: nothing}                              # nobody watches
  - {name: stable, settings: {optimizer.learning_rate: 0.006}}
  - {name: half the rate, policy: {ladder: {3: {learning_rate_scale: 0.5}}}}   # as in the settings of `rksp watch`
reference: stable                                # whose final losses the others are compared with, seed by seed
controls: [nothing, half the rate]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rksp_core.errors import ConfigError
from training.config import Config
from training.experiments.plan import assemble
from training.experiments.spec import Seed, Values, read_as
from training.schema.section import Section, Whole


class Arm(Section):
    """A way to help, or none; ``settings`` by dotted key win over the grid, ``policy`` is what the watcher does."""

    name: str = Field(pattern=r"\w")
    settings: dict[str, Any] = Field(default_factory=dict)
    policy: dict[str, Any] | None = None

    @property
    def slug(self) -> str:
        """The name as a folder may be called."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class RescueSpec(Section):
    """One experiment."""

    name: str = Field(pattern=r"^[\w.-]+$")
    base: dict[str, Any]
    grid: dict[str, Values] = Field(default_factory=dict)
    seeds: tuple[Seed, Seed]
    lag: Whole = 0
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    reference: str
    controls: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _arms_are_known_by_name(self) -> RescueSpec:
        slugs = [arm.slug for arm in self.arms]
        for arm in self.arms:
            if slugs.count(arm.slug) > 1:
                raise ValueError(f"two arms are called {arm.name!r}, or nearly so; change one")
        names = [arm.name for arm in self.arms]
        for name in (self.reference, *self.controls):
            if name not in names:
                raise ValueError(f"{name!r} is no arm; the arms are {', '.join(names)}")
        if self.seeds[0] > self.seeds[1]:
            raise ValueError(f"seeds must be [first, last], got {list(self.seeds)}")
        return self


@dataclass(frozen=True)
class RescueRun:
    """One run: ``point`` is where it lies in the grid, by dotted key, ``settings`` all that tells it from the base."""

    key: str
    arm: Arm
    seed: int
    point: Mapping[str, Any]
    settings: Mapping[str, Any]

    def config(self, spec: RescueSpec, output: Path | None = None) -> Config:
        """Return the trainer's configuration."""
        where = {} if output is None else {"output": str(output)}
        return assemble(spec.base, {**self.settings, "run_id": self.key, **where}, f"arm {self.arm.name!r}")


def plan(spec: RescueSpec) -> list[RescueRun]:
    """Return all runs, seed by seed: each beginning is the whole experiment on fewer seeds.

    Raises
    ------
    ConfigError
        When a run's configuration is none that the trainer takes, or its profiles come no later than the lag.
    """
    runs = []
    for seed, arm in itertools.product(range(spec.seeds[0], spec.seeds[1] + 1), spec.arms):
        grid = {key: values for key, values in spec.grid.items() if key not in arm.settings}
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            settings = {**point, **arm.settings, "seed": seed}
            content = [spec.base, settings] if arm.policy is None else [spec.base, settings, arm.policy, spec.lag]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
            run = RescueRun(f"{arm.slug}-{digest}-{seed}", arm, seed, point, settings)
            every = run.config(spec).profile.every
            if arm.policy is not None and not spec.lag < every:
                raise ConfigError(
                    f"lag = {spec.lag} must be less than profile.every = {every}, of arm {arm.name!r}: the answer to "
                    "a profile comes before the next one"
                )
            runs.append(run)
    return runs


def read_spec(path: Path) -> RescueSpec:
    """Read a rescue's YAML; see `training.experiments.spec.read_as`."""
    return read_as(path, RescueSpec)
