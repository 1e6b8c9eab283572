"""The schema of a sweep's YAML: which runs there are, on which seeds, and what is measured along each.

name: risk
base: {...}                       # a training configuration as in training/configs; output and device are left out
draw: {...}                       # of every group that samples, beside its own
groups:
  - name: pre_ln adamw
    settings: {model.arguments.norm: pre_ln}                       # one value each, by dotted key
    grid: {model.arguments.depth: [2, 4]}                          # every combination
    sample:                                                        # so many draws, spread evenly over the grid
      count: 40
      draw:
        task.batch: [8, 16, 32]                                    # each equally often
        optimizer.learning_rate: {log_uniform: [0.001, 0.1]}
        optimizer.weight_decay: {log_triangular: [0.001, 0.01, 0.1]}   # most of them near the second
seeds: {each: 1, tuning: [1000, 1999], held_out: [2000, 2999], untouched: [3000, 3999]}
split: {tuning: 0.4, held_out: 0.4, untouched: 0.2, stratify: [model.arguments.norm]}
measure: {profile: {every: 10, samples: 1024, sequences: 16}, look_ahead: [5, 20], sharpness: {every: 0}}
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from rksp_core.errors import ConfigError
from training.config import read_document
from training.schema.mistakes import sentence
from training.schema.section import Count, Positive, Section, Whole

Part = Literal["tuning", "held_out", "untouched"]
PARTS: tuple[Part, ...] = get_args(Part)

Kind = TypeVar("Kind", bound=Section)
Values = Annotated[list[Any], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
PartShare = Annotated[float, Field(ge=0, le=1)]


class Draw(Section):
    """Where a value comes from: a list of ``choices``, or a range whose logarithm is uniform, or triangular."""

    choices: Values | None = None
    log_uniform: tuple[Positive, Positive] | None = None
    log_triangular: tuple[Positive, Positive, Positive] | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_choices(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_way(self) -> Draw:
        given = [value for _, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("a draw is a list of choices, {log_uniform: [..]} or {log_triangular: [..]}: one of them")
        if self.choices is None and list(given[0]) != sorted(given[0]):
            raise ValueError(f"a range must ascend, got {list(given[0])}")
        return self

    def at(self, share: float) -> Any:
        """Return the value below which lies this share, in [0, 1), of all draws."""
        if self.choices is not None:
            return self.choices[int(share * len(self.choices))]
        if self.log_uniform is not None:
            low, high = map(math.log, self.log_uniform)
            return _rounded(math.exp(low + share * (high - low)))
        low, mode, high = map(math.log, self.log_triangular or ())
        span = high - low
        if span == 0 or share < (mode - low) / span:
            return _rounded(math.exp(low + math.sqrt(share * span * (mode - low))))
        return _rounded(math.exp(high - math.sqrt((1 - share) * span * (high - mode))))


class Sample(Section):
    """``count`` draws: a Latin hypercube, so that each key alone is spread evenly (McKay et al. 1979)."""

    count: Count
    draw: dict[str, Draw] = Field(default_factory=dict)


class Group(Section):
    """Runs that have something in common; its ``name`` and the keys determine what is drawn."""

    name: str = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Values] = Field(default_factory=dict)
    sample: Sample | None = None


class Seeds(Section):
    """``each``: runs of a configuration. A part draws its seeds from a range [first, last] of its own."""

    each: Count = 1
    tuning: tuple[Seed, Seed] = (1000, 1999)
    held_out: tuple[Seed, Seed] = (2000, 2999)
    untouched: tuple[Seed, Seed] = (3000, 3999)

    @model_validator(mode="after")
    def _disjoint(self) -> Seeds:
        ranges = sorted((*self.of(part), part) for part in PARTS)
        for first, last, part in ranges:
            if last - first + 1 < self.each:
                raise ValueError(f"seeds.{part} = [{first}, {last}] holds fewer than seeds.each = {self.each} seeds")
        for (_, last, one), (first, _, other) in itertools.pairwise(ranges):
            if first <= last:
                raise ValueError(f"seeds.{one} and seeds.{other} share seed {first}; give the parts seeds of their own")
        return self

    def of(self, part: Part) -> tuple[int, int]:
        """Return the first and the last seed of a part."""
        return {"tuning": self.tuning, "held_out": self.held_out, "untouched": self.untouched}[part]


class Split(Section):
    """The share of the configurations that each part gets, the same among all that agree in the ``stratify`` keys."""

    tuning: PartShare = 0.4
    held_out: PartShare = 0.4
    untouched: PartShare = 0.2
    stratify: tuple[str, ...] = ("model.arguments.norm",)

    @model_validator(mode="after")
    def _all(self) -> Split:
        if not math.isclose(self.tuning + self.held_out + self.untouched, 1.0):
            raise ValueError(f"the shares of split must add up to 1, got {sum(self.shares):g}")
        return self

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares in the order of `PARTS`."""
        return self.tuning, self.held_out, self.untouched


class ProfileMeasure(Section):
    """A profile of the probe every so many steps, from at most ``samples`` token states of ``sequences`` sequences."""

    every: Count = 10
    samples: Annotated[int, Field(ge=2, strict=True)] = 1024
    sequences: Count = 16


class SharpnessMeasure(Section):
    """Preconditioned sharpness every so many steps (0: never), on the first ``sequences`` of the training batch."""

    every: Whole = 0
    sequences: Annotated[int, Field(ge=1, le=16, strict=True)] = 16
    iterations: Annotated[int, Field(ge=2, strict=True)] = 10


class Measure(Section):
    """What is measured; nothing of it changes the run. ``look_ahead``: the steps K of each look-ahead."""

    profile: ProfileMeasure = ProfileMeasure()
    look_ahead: tuple[Count, ...] = (5, 20)
    sharpness: SharpnessMeasure = SharpnessMeasure()


class Spec(Section):
    """One sweep."""

    name: str = Field(pattern=r"^[\w.-]+$")
    base: dict[str, Any]
    draw: dict[str, Draw] = Field(default_factory=dict)
    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    seeds: Seeds = Seeds()
    split: Split = Split()
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _groups_have_names_of_their_own(self) -> Spec:
        names = [group.name for group in self.groups]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two groups are called {name!r}; what is drawn depends on the name, so change one")
        return self


def read_spec(path: Path) -> Spec:
    """Read a sweep's YAML; see `read_as`."""
    return read_as(path, Spec)


def read_as(path: Path, kind: type[Kind]) -> Kind:
    """Read the YAML of an experiment; ``name`` defaults to the file's.

    Raises
    ------
    ConfigError
        When the file cannot be read, a key is unknown or a value is out of its range.
    """
    document = read_document(path)
    document.setdefault("name", path.stem)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, kind)}") from error


def _rounded(value: float) -> float:
    """Four digits: what a rate is known to, and short enough to be read in a plan."""
    return float(f"{value:.4g}")
