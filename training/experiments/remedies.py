"""``python -m training.experiments.remedies SPEC.yaml``: what saves a run, told on a task that is learned.

An arm is a remedy, a moment from which it acts, and a strength. Every arm is run at each rate on the same seeds, and
judged by divergence, by failure (it did not diverge, but has not learned: loss above half of chance) and by its loss
against a stable reference on the same seeds and against half the learning rate at the same moment.

    name: remedies
    records: benchmarks/data/remedies/records.jsonl.gz
    base: {...}                     # a training configuration, without output
    rates: [0.012, 0.016]
    seeds: [7001, 7002, 7003]
    reference: {arm: nothing, rate: 0.006}
    arms:
      - {name: nothing}
      - {name: clip 1.0, clip: 1.0, start: 50}

A command that was ended goes on where it was; ``--table`` prints the results and runs nothing, ``--overhead`` measures
what each arm costs: the processor time of steps with it and without it, in turn, in one run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import joblib
import numpy as np
import torch
from pydantic import AfterValidator, Field, ValidationError

from rksp_core.atomic import write_atomic
from rksp_core.errors import ConfigError
from training.command import carried_out
from training.config import parse_config, read_document
from training.experiments.one_run import chance_loss
from training.experiments.ranking import estimate
from training.experiments.record import compact
from training.experiments.remedies_levers import FORMS, Remedy
from training.loop import conclude, drive
from training.ranks import Ranks
from training.run import Run, build_run
from training.schema.mistakes import sentence
from training.schema.section import Count, NotNegative, Positive, Section, Share, Whole
from training.step import Record, advance

SCHEMA = "rksp.remedy_record/1"
FEW = 5  # pairs, below which an interval would mislead
FINAL = 50  # steps whose mean training loss is the final one
WINDOW, JUMP = 50, 5.0  # start: gradient: a norm so many times the median of the window before


def _known(form: str) -> str:
    if form not in FORMS:
        raise ValueError(f"a form of KSS is one of {', '.join(FORMS)}, got {form!r}")
    return form


class Arm(Section):
    """A remedy: levers that act from ``start`` on, a step, or ``gradient``: the first jump of the gradient norm.

    settings                of the trainer, by dotted key, from the first step of the run
    rate, clip, beta2       a factor on the learning rate, the largest gradient norm, Adam's second beta
    noise                   Gaussian, so many times the norm of the gradient
    surprise                the limit of `rksp_core.surprise.clip_surprise`
    shrink                  share that the matrices of the blocks lose at each step
    weight_cap, logit_cap, form_cap
                            every ``interval`` steps: largest singular value of those matrices, largest attention score
                            (a bound of it, of the last batch), largest singular value of the form behind the scores
    form                    of KSS (`remedies_levers.FORMS`), every ``interval`` steps on a share of the blocks, grown
                            over ``ramp`` steps; ``weight`` times it goes into the ``loss``, or its gradient, scaled to
                            ``ratio`` times the norm of the task's, is added to the ``gradient`` (before the moments),
                            or likewise to the ``update`` (after them)
    """

    name: str
    start: Whole | Literal["gradient"] = 0
    rates: tuple[Positive, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    rate: Positive = 1.0
    clip: Positive | None = None
    beta2: Share | None = None
    noise: Positive | None = None
    surprise: Positive | None = None
    shrink: Positive | None = None
    weight_cap: Positive | None = None
    logit_cap: Positive | None = None
    form_cap: Positive | None = None
    form: Annotated[str, AfterValidator(_known)] | None = None
    weight: NotNegative = 0.15
    ratio: Positive = 0.1
    ramp: Whole = 0
    apply: Literal["loss", "gradient", "update"] = "loss"
    interval: Count = 10
    layer_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5


class Reference(Section):
    """The arm and the rate that stand for a run without trouble."""

    arm: str = "nothing"
    rate: Positive = 0.006


class RemedySpec(Section):
    """One screen or trial."""

    name: str
    records: str
    base: dict[str, Any]
    rates: tuple[Positive, ...]
    seeds: tuple[int, ...]
    reference: Reference = Reference()
    rival: str = "learning rate x 0.5"
    arms: tuple[Arm, ...]


class Watch:
    """Switches a remedy on at its moment and keeps what the record needs."""

    def __init__(self, remedy: Remedy) -> None:
        self.remedy = remedy
        self.losses: list[float] = []
        self.norms: list[float] = []

    def after(self, run: Run, record: Record | None) -> None:
        """Observe a step."""
        if record is not None:
            self.losses.append(record.loss)
            self.norms.append(record.gradient_norm)
        if not self.remedy.active and self._moment(run.step):
            self.remedy.switch_on()

    def back(self, run: Run) -> None:
        """Do nothing: no order sends these runs back."""

    def end(self, run: Run) -> None:
        """Do nothing."""

    def _moment(self, step: int) -> bool:
        start = self.remedy.arm.start
        if isinstance(start, int):
            return step >= start
        before = self.norms[-WINDOW - 1 : -1]
        return len(before) == WINDOW and self.norms[-1] > JUMP * statistics.median(before)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments.remedies")
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml")
    parser.add_argument("--table", action="store_true", help="print the results; run nothing")
    parser.add_argument("--overhead", action="store_true", help="measure what the arms cost; run nothing else")
    parser.add_argument("--arms", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    return carried_out("remedies", lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> None:
    spec = read_spec(arguments.spec)
    unknown = set(arguments.arms or ()) - {arm.name for arm in spec.arms}
    if unknown:
        raise ConfigError(f"{arguments.spec} has no arm {unknown.pop()!r}; its arms are in it by name")
    if arguments.table:
        print(table(spec, read_records(Path(spec.records))))
    elif arguments.overhead:
        measure_overhead(spec, arguments.arms)
    else:
        make(spec, arguments.arms, arguments.jobs, arguments.time_limit)


def read_spec(path: Path) -> RemedySpec:
    """Read the YAML.

    Raises
    ------
    ConfigError
        When it cannot be read, a key is unknown or a value is out of its range.
    """
    try:
        return RemedySpec.model_validate(read_document(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, RemedySpec)}") from error


def plan(spec: RemedySpec) -> list[tuple[Arm, float, int]]:
    """Return (arm, rate, seed) of all runs."""
    runs = [
        (arm, rate, seed) for arm in spec.arms for rate in arm.rates or spec.rates for seed in arm.seeds or spec.seeds
    ]
    return sorted(runs, key=lambda run: run[2])  # a beginning of it is a screen with fewer seeds


def start_run(spec: RemedySpec, arm: Arm, rate: float, seed: int, **changes: Any) -> tuple[Run, Watch]:
    """Return a run at step 0 with its remedy."""
    document = json.loads(json.dumps(spec.base)) | {"run_id": spec.name, "output": "nowhere", "threads": 1}
    document |= {"seed": seed, "device": "cpu"}
    document.setdefault("optimizer", {})["learning_rate"] = rate
    for key, value in (arm.settings | changes).items():
        *folders, name = key.split(".")
        place = document
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    run = build_run(parse_config(document, f"arm {arm.name!r}"), Ranks(0, 1, torch.device("cpu")))
    return run, Watch(Remedy(run, arm))


def carry_out(spec: RemedySpec, arm: Arm, rate: float, seed: int, deadline: float = math.inf) -> dict[str, Any] | None:
    """Make one run and return its record; None after the deadline."""
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    run, watch = start_run(spec, arm, rate, seed)
    began = time.process_time()
    drive(run, [watch])
    seconds = time.process_time() - began
    result = conclude(run, seconds=seconds)
    losses = [float(np.mean(watch.losses[i : i + FINAL])) for i in range(0, len(watch.losses), FINAL)]
    chance = chance_loss(run.config)
    finished = not run.diverged
    return {
        "schema": SCHEMA,
        "key": key(arm.name, rate, seed),
        "arm": arm.name,
        "rate": rate,
        "seed": seed,
        "settings": settings_of(arm),
        "horizon": run.config.steps,
        "diverged_at": run.labels.rksp,
        "since": watch.remedy.since if watch.remedy.active else None,
        "loss": compact(losses[-1]) if finished else None,
        "held_out": compact(result["loss"]) if finished else None,
        "failed": bool(finished and losses[-1] > chance / 2),
        "losses": [compact(loss) for loss in losses],
        "seconds": round(seconds, 1),
    }


def make(spec: RemedySpec, arms: list[str] | None, jobs: int, limit: float) -> None:
    """Make the runs that have no record yet, and write each record as soon as it is known."""
    path = Path(spec.records)
    records = {record["key"]: record for record in (read_records(path) if path.exists() else [])}
    left = [
        run for run in plan(spec) if key(run[0].name, *run[1:]) not in records and (not arms or run[0].name in arms)
    ]
    deadline = time.time() + limit
    with joblib.parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1):
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        for record in parallel(joblib.delayed(carry_out)(spec, *run, deadline) for run in left):
            if record is None:
                continue
            records[record["key"]] = record
            write_records(path, records.values())
            print(
                f"{record['key']}: diverged {record['diverged_at']} loss {record['loss']} since {record['since']} "
                f"{record['seconds']} s",
                flush=True,
            )


def settings_of(arm: Arm) -> dict[str, Any]:
    """Return what tells an arm from another, as it stands in the records."""
    return arm.model_dump(mode="json", exclude_defaults=True, exclude={"name", "rates", "seeds"})


def key(arm: str, rate: float, seed: int) -> str:
    """Return the name of a run."""
    return f"{arm} | {rate:g} | {seed}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a packed file of records.

    Raises
    ------
    ConfigError
        When it cannot be read.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"cannot read the records {path} ({error}); make them with the spec") from error


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write all records, sorted by key: the same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, separators=(",", ":"), allow_nan=False) for r in sorted(records, key=lambda r: r["key"])]
    write_atomic(path, gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))


def table(spec: RemedySpec, records: list[dict[str, Any]]) -> str:
    """Return a Markdown table, one row an arm and rate; paired differences are of runs that did not diverge."""
    found = {record["key"]: record for record in records}
    rows = [
        "| arm | rate | steps | n | diverged | failed | diverged at | final loss | - reference | - rival |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in spec.arms:
        for rate in arm.rates or spec.rates:
            keys = [key(arm.name, rate, seed) for seed in arm.seeds or spec.seeds]
            runs = [found[each] for each in keys if each in found]
            if runs:
                rows.append(_row(spec, arm.name, rate, runs, found))
    return "\n".join(rows)


def _row(spec: RemedySpec, arm: str, rate: float, runs: list[dict[str, Any]], found: dict[str, Any]) -> str:
    ends = [run["diverged_at"] for run in runs if run["diverged_at"] is not None]
    alive = [run for run in runs if run["diverged_at"] is None]
    cells = [
        arm,
        f"{rate:g}",
        str(runs[0]["horizon"]),
        str(len(runs)),
        str(len(ends)),
        str(sum(run["failed"] for run in alive)),
        f"{statistics.median(ends):.0f}" if ends else "-",
        f"{statistics.median(run['loss'] for run in alive):.3f}" if alive else "-",
        _paired(alive, found, spec.reference.arm, spec.reference.rate),
        _paired(alive, found, spec.rival, rate),
    ]
    return f"| {' | '.join(cells)} |"


def _paired(runs: list[dict[str, Any]], found: dict[str, Any], arm: str, rate: float) -> str:
    """Return the mean difference of final losses on the same seeds and steps, so on the same batches.

    With an interval where there are `FEW` pairs or more.
    """
    others = [found.get(key(arm, rate, run["seed"]), {"losses": []})["losses"] for run in runs]
    pairs = [
        run["loss"] - other[len(run["losses"]) - 1]
        for run, other in zip(runs, others, strict=True)
        if len(other) >= len(run["losses"])
    ]
    if len(pairs) < FEW:
        return f"{statistics.mean(pairs):+.3f}" if pairs else "-"
    differences = np.array(pairs)
    mean = estimate(lambda index: float(differences[index].mean()), len(pairs))
    return f"{mean.value:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]"


def measure_overhead(spec: RemedySpec, arms: list[str] | None, rate: float = 0.004, blocks: int = 13) -> None:
    """Print, for each arm, the processor time of 20 steps with it over that of the 20 before, without; median, range.

    Of the first two blocks, whose moments and caches are cold, nothing is taken.
    """
    torch.set_num_threads(1)
    for arm in spec.arms:
        if arms and arm.name not in arms:
            continue
        run, watch = start_run(spec, arm, rate, spec.seeds[0], steps=20 * blocks)
        times: list[float] = []
        for block in range(blocks):
            (watch.remedy.switch_on if block % 2 else watch.remedy.switch_off)()
            began = time.process_time()
            for _ in range(20):
                advance(run)
            times.append(time.process_time() - began)
        ratios = [times[block] / times[block - 1] - 1 for block in range(3, blocks, 2)]
        print(f"{arm.name}: {statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
