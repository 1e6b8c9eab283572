"""One look at a model before it is trained: profile, decision, baselines, warnings.

`preflight` computes; `rksp_monitor.commands.preflight` parses, prints and exits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rksp_core.errors import ModelError, NotFiniteError
from rksp_core.profile import LayerProfile, ModelProfile
from rksp_core.risk import RATE_FACTOR, Decision, decide, standard_learning_rate
from rksp_monitor.baselines import Loss, Progress, baseline_scores, largest_loss, take_look_ahead
from rksp_monitor.launch_risk import in_words, launch_of, look_ahead_steps, risk_document, suggest
from rksp_monitor.layer_threads import layer_threads
from rksp_monitor.memory import memory_limit
from rksp_monitor.probe import Probe, check_probe, model_input

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rksp_core.launch import Launch
    from rksp_core.lookahead import LookAhead
    from rksp_core.risk_model import RiskModel
    from rksp_monitor.models import LoadedModel

SCHEMA = "rksp.preflight/1"


@dataclass(frozen=True)
class Settings:
    """What to look at, and how.

    ``learning_rate`` is the planned peak rate; None leaves the baselines out. ``depth`` replaces the number of blocks
    in learning rate x depth. ``clipped``: whether the run clips the norm of its gradient. ``loss`` is (model output,
    batch) -> scalar; None means next-token cross-entropy. ``risk_models`` give the probabilities, the
    first that of divergence. ``steps`` of the look-ahead are theirs when None, or `rksp_monitor.baselines.STEPS` where
    they do not cover the model. ``threshold`` is the probability whose learning rate is looked for; None: none is.
    """

    blocks: str | None = None
    samples: int = 2048
    seed: int = 0
    micro_batch: int | None = None
    learning_rate: float | None = None
    standard_rate: float | None = None
    optimizer: str = "adamw"
    beta2: float | None = None
    clipped: bool = False
    depth: int | None = None
    steps: int | None = None
    loss: Loss | None = None
    risk_models: tuple[RiskModel, ...] = ()
    threshold: float | None = None


@dataclass(frozen=True)
class PreflightReport:
    """Everything `rksp preflight` says; ``baselines``, ``model`` and ``risk`` are JSON already."""

    model: Mapping[str, Any]
    profile: ModelProfile
    decision: Decision
    baselines: Mapping[str, Any]
    risk: Mapping[str, Any]
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the document of schema "rksp.preflight/1"; a profile can be read from it, too."""
        return {
            **self.profile.to_dict(),
            "schema": SCHEMA,
            "model": dict(self.model),
            "decision": {
                "verdict": self.decision.verdict,
                "reasons": list(self.decision.reasons),
                "caveat": self.decision.caveat,
            },
            "risk": {**self.risk, "baselines": dict(self.baselines)},
            "warnings": list(self.warnings),
            "versions": _versions(),
        }


def preflight(
    model: LoadedModel,
    probe: Probe,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> PreflightReport:
    """Profile the model on the probe and decide.

    The module is moved to ``device`` and, when it is given, to ``dtype``; otherwise it is left as it is.

    Raises
    ------
    NoBlocksError, ModelError, ProbeError
        When the model and the probe do not go together.
    NotFiniteError
        When activations are not finite, with the first bad layer.
    MemoryLimitError
        When the work does not fit.
    """
    from rksp_core.capture import find_blocks
    from rksp_core.profiling import profile_model

    check_probe(probe, model)
    with memory_limit(device):
        module = model.module.to(device=device, dtype=dtype)
        blocks = find_blocks(module, settings.blocks)
        batch = model_input(probe, module, device, dtype)

        def profile_again(changed: nn.Module) -> ModelProfile:
            with layer_threads() as executor:
                return profile_model(
                    changed,
                    batch,
                    blocks=settings.blocks,
                    samples=settings.samples,
                    seed=settings.seed,
                    micro_batch=settings.micro_batch,
                    executor=executor,
                    progress=progress,
                    probe=probe.to_dict(),
                )

        profile = profile_again(module)
        _require_finite(profile.layers)
        width = max(layer.width for layer in profile.layers)
        steps = look_ahead_steps(settings, depth=len(blocks), width=width)
        settings = dataclasses.replace(settings, steps=steps)
        ahead = take_look_ahead(model, module, batch, settings, profile_again, progress)
    normalized = has_normalization(block.module for block in blocks)
    standard = settings.standard_rate or standard_learning_rate(width, settings.optimizer)
    launch = launch_of(ahead, settings, depth=len(blocks), width=width)
    risks = [] if launch is None else [model.risk(launch) for model in settings.risk_models]
    decision = decide(
        profile.layers,
        normalized=normalized,
        learning_rate=settings.learning_rate,
        standard_rate=standard,
        look_ahead_loss=largest_loss(ahead),
        risks=risks,
    )
    safe = None
    if settings.threshold is not None and risks and all(risk.probability is not None for risk in risks):

        def launch_at(rate: float) -> Launch:
            if launch is not None and rate == settings.learning_rate:
                return launch
            at_rate = dataclasses.replace(settings, learning_rate=rate)
            with memory_limit(device):
                taken = take_look_ahead(model, module, batch, at_rate, None, progress)
            found = launch_of(taken, at_rate, depth=len(blocks), width=width)
            if found is None:
                raise ModelError(f"the look-ahead at the learning rate {rate:g} is unavailable: {taken}")
            return found

        safe = suggest(settings, launch_at)
        decision = dataclasses.replace(decision, reasons=(*decision.reasons, in_words(safe)))
    return PreflightReport(
        model=_describe(model, module, normalized),
        profile=profile,
        decision=decision,
        baselines=baseline_scores(profile, settings, standard, ahead),
        risk=risk_document(settings, launch, risks, safe),
        warnings=tuple(_warnings(model, probe, profile, settings, standard, ahead)),
    )


def has_normalization(blocks: Iterable[nn.Module]) -> bool:
    """Whether a normalization module lies in the blocks, by the class names of their leaves.

    Leaves only: a residual wrapper may be called ``NoNorm``. A norm that is a mere function call is not seen.
    """
    norm = re.compile(r"(layer|rms|group|batch|instance|scale|local_?response)_?norm", re.IGNORECASE)
    leaves = (part for block in blocks for part in block.modules() if not list(part.children()))
    return any(norm.search(type(leaf).__name__) for leaf in leaves)


def _require_finite(layers: Iterable[LayerProfile]) -> None:
    for number, layer in enumerate(layers):
        if "not_finite" in layer.status:
            raise NotFiniteError(
                f"activations are not finite, first in {layer.layer} (block {number} in depth order): "
                "check the weights, lower the initial scale, or use a wider --dtype"
            )


def _describe(model: LoadedModel, module: nn.Module, normalized: bool) -> dict[str, Any]:
    parameters = list(module.parameters())
    return {
        "source": model.source,
        "kind": model.kind,
        "weights": model.weights,
        "class": type(module).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "vocabulary": model.vocabulary,
        "max_length": model.max_length,
        "normalization": normalized,
        "device": str(parameters[0].device) if parameters else "cpu",
    }


def _warnings(
    model: LoadedModel,
    probe: Probe,
    profile: ModelProfile,
    settings: Settings,
    standard: float | None,
    ahead: LookAhead | str | None,
) -> Iterator[str]:
    """Yield one sentence a finding; equal remedies of several layers are one sentence."""
    yield from model.warnings
    if probe.metadata.get("default"):
        yield f"no --probe was given, so the probe is {probe.origin}; make one from real text with `rksp probe make`"
    remedies: dict[str, list[LayerProfile]] = {}
    for layer in profile.layers:
        if layer.remedy:
            remedies.setdefault(f"{', '.join(layer.status)}: {layer.remedy}", []).append(layer)
    for text, layers in remedies.items():
        names = layers[0].layer if len(layers) == 1 else f"{len(layers)} layers ({layers[0].layer} first)"
        yield f"{names}: {text}"
    if isinstance(ahead, str):
        yield f"the look-ahead is unavailable: {ahead}"
    if settings.learning_rate is not None and standard is None:
        yield (
            f"no standard learning rate is known for {settings.optimizer}, so the rule of {RATE_FACTOR:g} times the "
            "standard one was left out; give it with --standard-lr"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("rksp", "torch"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout that was not installed
            found[name] = version(name)
    return found
