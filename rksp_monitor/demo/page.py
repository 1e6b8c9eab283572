"""The page at the end of the demo: what happened in both arms, in figures and in one honest sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rksp_core.features import features
from rksp_core.policy import LEVELS
from rksp_core.profile import ModelProfile
from rksp_monitor.demo.arm import Arm
from rksp_monitor.history import EVERYTHING, read_history
from rksp_monitor.report.plots import inline_svg, new_figure

COLOURS = ("#b2182b", "#1b7837")
# What is drawn of a stretch that was undone, panel by panel.
UNDONE = ("loss", "gradient_norm", "near_unit_mass_min", "log_kreiss_mean")


@dataclass(frozen=True)
class Story:
    """What one arm did, as plain numbers."""

    name: str
    status: str
    steps: int
    horizon: int
    diverged_at: int | None
    alarm_at: int | None
    ordered_at: int | None
    applied_at: int | None
    orders: int
    went_back: tuple[tuple[int, int], ...]  # from which step to which
    rate_scale: float  # the factor on the learning rate that held in the end
    kss_weight: float
    loss: float | None
    accuracy: float


def tell(arm: Arm) -> Story:
    """Read an arm's files and samples."""
    result, steps = arm.result(), arm.steps()
    alarms = [s.judged_step for s in arm.samples if (s.risk or 0) >= LEVELS.index("high") and s.judged_step is not None]
    # The step that was being made when the order was first seen, and where it was first obeyed.
    orders = [s.step for s in arm.samples if (s.desired_generation or 0) > 0 and s.step is not None]
    went_back = tuple((back["left"], back["reached"]) for back in result["rollbacks"])
    obeyed = next((line["step"] for line in steps if line["control_generation"] > 0), None)
    if went_back and (obeyed is None or obeyed > went_back[0][1]):  # the order that took it back
        obeyed = went_back[0][0]
    return Story(
        name=arm.name,
        status=result["status"],
        steps=len(steps),
        horizon=result["horizon"],
        diverged_at=result["diverged_at"]["rksp"],
        alarm_at=int(alarms[0]) if alarms else None,
        ordered_at=orders[0] if orders and arm.enforce else None,
        applied_at=obeyed,
        orders=int(arm.samples[-1].desired_generation or 0) if arm.enforce and arm.samples else 0,
        went_back=went_back,
        rate_scale=_rate_scale(arm),
        kss_weight=max((line["kss_weight"] for line in steps), default=0.0),
        loss=result["loss"],
        accuracy=result["accuracy"],
    )


def verdict(alone: Story, looped: Story) -> str:
    """Say in one sentence what this pair of runs shows, and no more."""
    if looped.applied_at is None:
        if alone.diverged_at is None and looped.diverged_at is None:
            return "Neither run diverged and no order was given: this seed shows the watcher at rest."
        late = "the order came too late to be obeyed" if looped.orders else "no order was given"
        if alone.diverged_at is None or looped.diverged_at is None:
            one = looped if alone.diverged_at is None else alone
            return f"Only the run {one.name} diverged, at step {one.diverged_at}, and {late}."
        steps = f"at step {alone.diverged_at} without the loop and {looped.diverged_at} with it"
        return f"Both runs diverged, {steps}: {late}."
    what = _done(looped)
    if alone.diverged_at is None and looped.diverged_at is None:
        return f"{what}, but the run without the loop did not diverge either: a false alarm, on this seed."
    if alone.diverged_at is None:
        return f"{what}, and diverged at step {looped.diverged_at}, while the one without it did not: it harmed."
    if looped.diverged_at is None:
        return (
            f"{what}; it reached its horizon of {looped.horizon} steps, and the one without it diverged at step "
            f"{alone.diverged_at}: saved, on this seed and up to this horizon."
        )
    gained = looped.diverged_at - alone.diverged_at
    change = f"{abs(gained)} steps {'later than' if gained > 0 else 'earlier than'}" if gained else "just as"
    return f"{what}; it diverged all the same, at step {looped.diverged_at}, {change} the one without it."


def _done(looped: Story) -> str:
    """Say what the run did that obeyed."""
    did = [f"went back from step {left} to step {reached}" for left, reached in looped.went_back]
    if looped.rate_scale < 1:
        did.append(f"went on at {looped.rate_scale:g} of its learning rate")
    if looped.kss_weight > 0:
        did.append(f"switched KSS on at weight {looped.kss_weight:g}")
    first = "" if looped.went_back else f" at step {looped.applied_at}"
    return f"Ordered to, the run with the loop{first} {' and '.join(did) or 'obeyed'}"


def _rate_scale(arm: Arm) -> float:
    """Return the factor on the learning rate that the trainer last acknowledged as active."""
    try:
        active = json.loads((arm.folder / "control" / "applied.json").read_text(encoding="utf-8"))["active"]
    except (OSError, ValueError, KeyError):
        return 1.0
    return float(active.get("learning_rate_scale") or 1.0)


def write_page(arms: Sequence[Arm], settings: dict[str, Any]) -> str:
    """Return the page as one self-contained HTML document. ``arms``: without the loop, with it."""
    stories = [tell(arm) for arm in arms]
    environment = Environment(
        loader=PackageLoader("rksp_monitor.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("demo.html.j2").render(
        verdict=verdict(stories[0], stories[1]),
        stories=[dataclasses.asdict(story) for story in stories],
        # Our own drawings, made of numbers.
        figures=[Markup(_figure(arms, stories))],  # noqa: S704
        settings=settings,
    )


def _figure(arms: Sequence[Arm], stories: Sequence[Story]) -> str:
    profiles = [_profiles(arm) for arm in arms]
    logs = [arm.steps() for arm in arms]
    with new_figure(11.8, 8.4) as figure:
        axes = figure.subplots(3, 2, sharex=True)
        for index, (arm, story) in enumerate(zip(arms, stories, strict=True)):
            style: dict[str, Any] = {"color": COLOURS[index], "label": arm.name, "linewidth": 1.3}
            steps = [line["step"] for line in logs[index]]
            axes[0, 0].plot(steps, _known(line["loss"] for line in logs[index]), **style)
            axes[0, 1].plot(steps, _known(line["gradient_norm"] for line in logs[index]), **style)
            at = [profile.step for profile in profiles[index]]
            numbers = [features(profile) for profile in profiles[index]]
            axes[1, 0].plot(at, _known(one.get("near_unit_mass_min") for one in numbers), **style)
            axes[1, 1].plot(at, _known(one.get("log_kreiss_mean") for one in numbers), **style)
            judged = [s for s in arm.samples if s.judged_step is not None and s.risk is not None]
            back = [before > after for before, after in pairwise([0, *(s.judged_step or 0 for s in judged)])]
            starts = [0, *(number for number, fell in enumerate(back) if fell), len(judged)]
            for first, last in pairwise(starts):  # a run that went back is drawn anew from there, not across
                undone_part = {"linestyle": "--", "alpha": 0.45} if last < len(judged) else {}
                part = judged[first:last]
                axes[2, 0].step(
                    [s.judged_step for s in part], [s.risk for s in part], where="post", **style | undone_part
                )
            axes[2, 1].step(steps, [line["learning_rate"] for line in logs[index]], where="post", **style)
            undone = _undone(arm)
            faint = style | {"linestyle": "--", "alpha": 0.45, "label": None}
            for axis, name in zip(axes.flat, UNDONE, strict=False):
                axis.plot([step for step, _ in undone], _known(values.get(name) for _, values in undone), **faint)
            for axis in axes.flat:
                if story.diverged_at is not None:
                    axis.axvline(story.diverged_at, color=COLOURS[index], linewidth=0.9, linestyle=":")
                if story.applied_at is not None:
                    axis.axvline(story.applied_at, color="#2166ac", linewidth=0.9, linestyle="--")
        titles = (
            "task loss",
            "gradient norm before clipping",
            "near-unit mass, smallest over layers",
            "log of the mean Kreiss constant",
            "risk level of the watcher",
            "learning rate as applied",
        )
        for axis, title in zip(axes.flat, titles, strict=True):
            axis.set_title(title)
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_yscale("log")
        axes[2, 0].set_yticks(range(len(LEVELS)), LEVELS)
        for axis in axes[2]:
            axis.set_xlabel("step")
        axes[0, 0].legend(frameon=False)
        return inline_svg(figure, "Both runs of the demo, step by step")


def _profiles(arm: Arm) -> list[ModelProfile]:
    return [ModelProfile.load(path) for path in sorted(arm.folder.glob("profiles/step-*.json"))]


def _undone(arm: Arm) -> list[tuple[int, Mapping[str, float]]]:
    """Return what the watcher's ledger keeps of the steps that the trainer has undone: the trainer keeps nothing."""
    rows = read_history(arm.folder, run=arm.name).rows(EVERYTHING)
    kept = [(row.step, row.evidence["drift"]["values"]) for row in rows if row.set_aside and row.evidence is not None]
    return sorted(kept, key=lambda one: one[0])


def _known(values: Any) -> list[float]:
    return [float("nan") if value is None else value for value in values]
