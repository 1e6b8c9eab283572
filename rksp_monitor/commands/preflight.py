"""``rksp preflight MODEL``: parse, compute, print the report, exit by the verdict."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rksp_core.errors import ConfigError, NotFiniteError
from rksp_monitor.commands.output import emit, terminal
from rksp_monitor.output_file import require_writable
from rksp_monitor.report import Format

if TYPE_CHECKING:
    from rksp_core.risk import Verdict
    from rksp_core.risk_model import RiskModel
    from rksp_monitor.baselines import Progress
    from rksp_monitor.models import LoadedModel
    from rksp_monitor.probe import Probe

FailOn = Literal["monitor", "use_kss"]
OnInconclusive = Literal["report", "pass", "fail"]
NO_RISK_MODEL = Path("none")


def preflight(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="package.module:factory, a Hugging Face folder or its config.json, or a trainer's YAML configuration.",
        ),
    ],
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the factory; the value is read as YAML."),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(help="A probe, or a raw .npy, .pt or .safetensors batch; default: seeded random tokens."),
    ] = None,
    blocks: Annotated[str | None, typer.Option(metavar="GLOB", help="Residual blocks, e.g. 'transformer.h.*'.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Planned peak learning rate; adds the look-ahead.")] = None,
    optimizer: Annotated[
        Literal["adamw", "adam", "lion", "sgd"], typer.Option(help="Of the run, and so of the look-ahead.")
    ] = "adamw",
    beta2: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of Adam (default .999) or Lion (.99), in the look-ahead.")
    ] = None,
    clip: Annotated[
        bool, typer.Option("--clip", help="The run clips the norm of its gradient; the look-ahead does not.")
    ] = False,
    standard_lr: Annotated[
        float | None, typer.Option(min=0, help="The usual rate for this model; default: by width, for Adam.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Blocks in learning rate x depth; default: those found.")
    ] = None,
    look_ahead_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Full-rate steps of the look-ahead; default: those of the risk model, or 5."),
    ] = None,
    risk_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|none",
            help="Made by `rksp calibrate`: gives the probability, which decides. Default: those that come with rksp; "
            "none: the paper's rule decides.",
        ),
    ] = None,
    suggest_lr: Annotated[
        float | None, typer.Option(metavar="RISK", help="Look for the learning rate whose risk is this, e.g. 0.1.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="(model output, batch) -> scalar; default: next-token loss."),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Token states to profile.")] = 2048,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of initialization, random tokens and sampling.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:n]")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|...", help="Cast the model; default: as it is.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Of the report on stdout.")] = "table",
    output_file: Annotated[Path | None, typer.Option(help="Write the report there instead of to stdout.")] = None,
    fail_on: Annotated[FailOn, typer.Option(help="Exit 1 from this verdict on.")] = "use_kss",
    on_inconclusive: Annotated[
        OnInconclusive, typer.Option(help="Exit code of an inconclusive verdict: report 3, pass 0, fail 1.")
    ] = "report",
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 whatever the verdict.")] = False,
) -> int:
    """Look at a model before it is trained: the spectra of its residual stream, warnings, and a decision."""
    if standard_lr == 0:
        raise ConfigError("--standard-lr must be above 0, got 0; leave it out for the rate that is usual at this width")
    of_lr = {
        "--depth": depth,
        "--standard-lr": standard_lr,
        "--loss": loss,
        "--risk-model": risk_model,
        "--beta2": beta2,
        "--clip": clip or None,
    }
    of_lr["--suggest-lr"] = suggest_lr
    for name, value in of_lr.items():
        if lr is None and value is not None:
            raise ConfigError(f"{name} is of no use without --lr; give the planned peak learning rate as well")
    calibrated = () if lr is None else _risk_models(risk_model, suggest_lr, look_ahead_steps)
    if output_file is not None:
        require_writable(output_file)
    with progress_bar() as progress:
        from rksp_core.device import choose_device, parse_dtype
        from rksp_monitor.memory import memory_limit
        from rksp_monitor.models import load_model
        from rksp_monitor.preflight import Settings
        from rksp_monitor.preflight import preflight as look
        from rksp_monitor.report import render

        place, precision = choose_device(device), None if dtype is None else parse_dtype(dtype)
        with memory_limit(place):
            loaded = load_model(model, arguments=parse_arguments(arg or []), seed=seed)
        settings = Settings(
            blocks=blocks,
            samples=samples,
            seed=seed,
            micro_batch=micro_batch,
            learning_rate=lr,
            standard_rate=standard_lr,
            optimizer=optimizer,
            beta2=beta2,
            clipped=clip,
            depth=depth,
            steps=look_ahead_steps,
            loss=None if loss is None else _loss(loss),
            risk_models=calibrated,
            threshold=suggest_lr,
        )
        batch = _probe(probe, loaded, seed)
        try:
            report = look(loaded, batch, settings, device=place, dtype=precision, progress=progress)
        except NotFiniteError as error:
            print(f"rksp: {error}", file=sys.stderr)
            return exit_code("inconclusive", fail_on, on_inconclusive, exit_zero=exit_zero)
    text = render(report, form, **terminal(output_file))
    emit(text, output_file, f"{report.decision.verdict}; the report is in")
    return exit_code(report.decision.verdict, fail_on, on_inconclusive, exit_zero=exit_zero)


def _risk_models(path: Path | None, threshold: float | None, steps: int | None) -> tuple[RiskModel, ...]:
    """Read the risk model, or those that come with rksp, and refuse what does not go with it.

    Another number of steps than theirs leaves the latter out: there is no probability then.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigError(f"--suggest-lr takes a probability above 0 and below 1, got {threshold:g}")
    from rksp_core.risk_model import RiskModel

    if path is None:
        models = tuple(model for model in RiskModel.bundled() if steps in (None, model.look_ahead_steps))
    elif path == NO_RISK_MODEL:
        models = ()
    else:
        models = (RiskModel.read(path),)
    if threshold is not None and not models:
        raise ConfigError("--suggest-lr needs a risk model; leave --risk-model none or --look-ahead-steps out")
    for model in models:
        if steps not in (None, model.look_ahead_steps):
            raise ConfigError(
                f"{path} was calibrated on look-aheads of {model.look_ahead_steps} steps, got --look-ahead-steps "
                f"{steps}; leave that out"
            )
    return models


def exit_code(verdict: Verdict, fail_on: FailOn, on_inconclusive: OnInconclusive, *, exit_zero: bool) -> int:
    """Return 0 pass, 1 risk at or above ``fail_on``, 3 inconclusive."""
    from rksp_core.risk import VERDICTS

    if exit_zero:
        return 0
    if verdict == "inconclusive":
        return {"report": 3, "pass": 0, "fail": 1}[on_inconclusive]
    return int(VERDICTS.index(verdict) >= VERDICTS.index(fail_on))


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """Return ``key=value`` pairs as a mapping; values are YAML: 3 is a whole number, true a truth value.

    Raises
    ------
    ConfigError
        When a pair has no ``=`` or its value is no YAML.
    """
    import yaml

    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--arg takes key=value, got {pair!r}")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --arg {name} is no YAML: {value!r}; put it in quotes") from error
    return arguments


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Show what is done, on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("model and forward pass", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def _loss(reference: str) -> Callable[[Any, Any], Any]:
    from rksp_monitor.models import import_object, user_code

    function = import_object(reference, [Path.cwd()])

    def loss(output: Any, batch: Any) -> Any:
        with user_code(f"the loss {reference}"):
            return function(output, batch)

    return loss


def _probe(path: Path | None, model: LoadedModel, seed: int) -> Probe:
    from rksp_core.errors import ProbeError
    from rksp_monitor.probe import LENGTH, default_probe, read_probe

    if path is not None:
        return read_probe(path)
    if model.vocabulary is None:
        raise ProbeError(f"{model.source} does not say how many tokens it takes, so none can be drawn; give a --probe")
    return default_probe(model.vocabulary, min(LENGTH, model.max_length or LENGTH), seed)
