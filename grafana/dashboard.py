"""Generate the Grafana dashboard ``rksp.json`` (schema of Grafana 11.6).

Run ``python grafana/dashboard.py`` after a change and commit both files; a test compares them. The top row answers
what someone woken at night asks first: is a run in trouble, is the watcher alive, has the trainer obeyed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from panels import RISK_STEPS, RISK_WORDS, SOURCE, Words, lines, number, timeline

TARGET = Path(__file__).with_name("rksp.json")
WATCHER = 'job=~"$job",instance=~"$instance"'
RUN = f'{WATCHER},run=~"$run"'
WORST = 6  # runs that a large number shows: the worst ones, of however many
TROUBLE: Words = {0: ("no", "green"), 1: ("YES", "red")}


def build() -> str:
    """Return the dashboard as the JSON text that is committed."""
    board = (
        dashboard.Dashboard("RKSP: spectra of training runs")
        .uid("rksp")
        .description(
            "Koopman spectra of the residual stream, risk, and what the trainer was told (see docs/runbook.md)."
        )
        .tags(["rksp", "training"])
        .timezone("utc")
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .editable()
    )
    for choice in variables():
        board.with_variable(choice)
    for title, panels, collapsed in rows():
        row = dashboard.Row(title).collapsed(collapsed)
        if collapsed:
            for panel in panels:
                row.with_panel(panel)
        board.with_row(row)
        if not collapsed:
            for panel in panels:
                board.with_panel(panel)
    document: dict[str, Any] = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    document["annotations"] = {"list": switch_marks()}
    for variable in document["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):  # of interval variables; the SDK writes them for every kind
            variable.pop(name)
    for identity, panel in enumerate(_all_panels(document["panels"]), start=1):
        panel["id"] = identity
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def variables() -> list[Any]:
    """``$datasource``, ``$job``, ``$instance``, ``$run``, each narrowing the next."""
    # "All" means the listed values for job and instance, or `up` would count every other target of Prometheus;
    # for run it means any, so that a run that starts while the page is open appears.
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        _choice("job", "Job", "label_values(rksp_build_info, job)"),
        _choice("instance", "Watcher", 'label_values(rksp_build_info{job=~"$job"}, instance)'),
        _choice("run", "Run", f"label_values(rksp_run_info{{{WATCHER}}}, run)").all_value(".*"),
    ]


def switch_marks() -> list[dict[str, Any]]:
    """Vertical lines where a risk level changed, an order was written, and the trainer switched KSS."""
    # Plain dictionaries: the SDK has no place for the Prometheus fields of an annotation (step, formats). The window
    # is twice the step, so that a switch between two evaluations is never lost.
    marks = (
        ("Risk level changed", "rksp_risk_level", "orange", "risk level of {{run}}"),
        ("KSS switched by the trainer", "rksp_control_applied_generation", "blue", "KSS switched in {{run}}"),
        ("New order from the watcher", "rksp_control_desired_generation", "purple", "new order for {{run}}"),
    )
    return [
        {
            "name": name,
            "datasource": {"type": "prometheus", "uid": "$datasource"},
            "enable": True,
            "hide": False,
            "iconColor": colour,
            "expr": f"changes({metric}{{{RUN}}}[2m]) > 0",
            "step": "60s",
            "titleFormat": title,
            "tagKeys": "run",
        }
        for name, metric, colour, title in marks
    ]


def rows() -> list[tuple[str, list[Any], bool]]:
    """Return (title, panels, collapsed) from top to bottom."""
    return [
        ("Is anything wrong?", overview(), False),
        ("Risk and drift", risk(), False),
        ("Signalling", signalling(), False),
        ("Spectra", spectra(), False),
        ("Runs, checkpoints and replay", checkpoints(), False),
        ("Layers (only when the watcher exports them)", layers(), True),
    ]


def overview() -> list[Any]:
    """Seven numbers that must be readable from the other end of the room; of many runs, the worst ones."""
    behind = f"rksp_control_desired_generation{{{RUN}}} - rksp_control_applied_generation{{{RUN}}}"
    age = f"time() - rksp_checkpoint_last_processed_timestamp_seconds{{{RUN}}}"
    return [
        number(
            "Risk",
            f"Risk level as the policy judges it, of the {WORST} runs where it is highest. Advisory: healthy learning "
            "moves the spectra too; look at the loss before you act.",
            f"topk({WORST}, rksp_risk_level{{{RUN}}})",
            steps=RISK_STEPS,
            words=RISK_WORDS,
            width=6,
        ),
        number(
            "Watcher",
            "Whether Prometheus can scrape each watcher. DOWN or no data: nobody is looking at the run; the training "
            "itself does not depend on the watcher.",
            f"up{{{WATCHER}}}",
            legend="{{instance}}",
            steps=((None, "red"), (1.0, "green")),
            words={0: ("DOWN", "red"), 1: ("alive", "green")},
            empty="ABSENT",
        ),
        number(
            "Runs not watched",
            "Runs that the watcher has suspended and keeps trying, or whose folder hangs; its log says why. The others "
            "go on.",
            f"sum(rksp_run_suspended{{{RUN}}})",
            legend="not watched",
            steps=((None, "green"), (1.0, "red")),
        ),
        number(
            "Trainer behind by",
            f"Orders that the trainer has not acknowledged (desired minus applied generation), of the {WORST} runs "
            "furthest behind. 0: it has obeyed.",
            f"topk({WORST}, {behind})",
            steps=((None, "green"), (1.0, "red")),
            words={0: ("obeyed", "green")},
            unit="suffix: orders",
        ),
        number(
            "Held by a person",
            "Runs whose policy somebody holds back or overrides; `rksp control status` says who and why.",
            f"sum(rksp_control_held{{{RUN}}})",
            legend="held",
            steps=((None, "green"), (1.0, "yellow")),
        ),
        number(
            "Since last result",
            f"Time since a checkpoint or profile was last judged, of the {WORST} runs where it is longest. Compare "
            "with how often the run writes one.",
            f"topk({WORST}, {age})",
            unit="s",
            steps=((None, "green"), (1800.0, "yellow"), (3600.0, "red")),
        ),
        number(
            "Alerts firing",
            "Firing alerts whose name starts with Rksp, over all runs. Each has an entry in docs/runbook.md.",
            'count(ALERTS{alertname=~"Rksp.*",alertstate="firing"}) or vector(0)',
            legend="firing",
            steps=((None, "green"), (1.0, "red")),
        ),
    ]


def risk() -> list[Any]:
    """How the risk level came about."""
    return [
        timeline(
            "Risk level",
            "Risk level of each run over time. Orange, purple and blue lines: it changed, an order was written, the "
            "trainer switched KSS.",
            RISK_WORDS,
            (f"rksp_risk_level{{{RUN}}}", "{{run}}"),
            width=24,
        ),
        lines(
            "Drift of the near-unit mass",
            "Mean share of modes near the unit circle, minus that of the run's first profile. It fell before "
            "divergence, and also while a healthy run learned.",
            "percentunit",
            (f"rksp_near_unit_mass_drift{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Drift of the Kreiss constant",
            "Natural logarithm of the largest Kreiss constant over that of the run's first profile: 0.7 is a doubling, "
            "and more transient growth.",
            "none",
            (f"rksp_kreiss_constant_drift{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Step of the smallest near-unit mass, in units of its noise",
            "Smallest near-unit mass over layers, minus its trailing average, in trailing standard deviations. Between "
            "-3 and 3 it cannot be told from chance.",
            "suffix: sigma",
            (f"rksp_drift_sigmas{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Distance of the spectra from the first ones",
            "Wasserstein distance between the moduli of the eigenvalues and those of the run's first profile, of the "
            "layer that moved furthest: 0.1 means that modes moved by 0.1 on average. Learning moves it too.",
            "none",
            (f"rksp_wasserstein_drift{{{RUN}}}", "{{run}}"),
        ),
    ]


def signalling() -> list[Any]:
    """What the watcher asked for and what the trainer did."""
    return [
        lines(
            "KSS weight and limit of surprise",
            "Regularizer weight alpha (0 is off), and how many times its usual size a gradient may enter Adam's "
            "moments (no line: as the trainer has it): ordered by the watcher, and applied by the trainer. "
            "The lines should meet within a few steps of an order.",
            "none",
            (f"rksp_kss_desired_weight{{{RUN}}}", "{{run}} desired"),
            (f"rksp_kss_applied_weight{{{RUN}}}", "{{run}} applied"),
            (f"rksp_surprise_desired_limit{{{RUN}}}", "{{run}} surprise desired"),
            (f"rksp_surprise_applied_limit{{{RUN}}}", "{{run}} surprise applied"),
        ),
        lines(
            "Share of the learning rate",
            "What the watcher ordered as a factor on the trainer's own schedule, and what the trainer applied: 1 is "
            "its own rate; the shipped policy halves it each time it takes a run back.",
            "percentunit",
            (f"rksp_learning_rate_desired_ratio{{{RUN}}}", "{{run}} desired"),
            (f"rksp_learning_rate_applied_ratio{{{RUN}}}", "{{run}} applied"),
        ),
        lines(
            "Order generation",
            "Number of the newest order and of the newest one the trainer acknowledged. A lasting gap fires an alert.",
            "none",
            (f"rksp_control_desired_generation{{{RUN}}}", "{{run}} desired"),
            (f"rksp_control_applied_generation{{{RUN}}}", "{{run}} applied"),
        ),
        lines(
            "Times the trainer went back",
            "How often the trainer said that an order took it back to an earlier checkpoint. Each time costs the steps "
            "since then; limits.rollbacks of the trainer ends it.",
            "none",
            (f"rksp_control_rollbacks_total{{{RUN}}}", "{{run}}"),
        ),
        timeline(
            "Held by a person, or overdue at the trainer",
            "Held: somebody holds the policy back or orders something else. Overdue: the trainer has not answered an "
            "order within control.acknowledge_within.",
            TROUBLE,
            (f"rksp_control_held{{{RUN}}}", "{{run}} held"),
            (f"rksp_control_acknowledgement_overdue{{{RUN}}}", "{{run}} overdue"),
        ),
        lines(
            "Notifications per minute",
            "Events for webhooks and hooks: accepted, refused after all attempts, and dropped because too many waited. "
            "Without webhooks and hooks all stay 0.",
            "cpm",
            *[
                (f"60 * rate(rksp_notifications_{name}_total{{{RUN}}}[$__rate_interval])", f"{{{{run}}}} {name}")
                for name in ("sent", "failed", "dropped")
            ],
        ),
    ]


def spectra() -> list[Any]:
    """The spectral figures of the newest profile, over its layers."""
    return [
        lines(
            "Near-unit mass",
            "Share of modes with |lambda| near 1: mean over layers, and the smallest layer.",
            "percentunit",
            (f"rksp_near_unit_mass_ratio{{{RUN}}}", "{{run}} mean"),
            (f"rksp_near_unit_mass_min_ratio{{{RUN}}}", "{{run}} smallest layer"),
        ),
        lines(
            "Kreiss constant",
            "Worst-case transient growth (reference radius max(1, 1.05 rho)); 1 is the least it can be.",
            "none",
            (f"rksp_kreiss_constant_max{{{RUN}}}", "{{run}} largest layer"),
            (f"rksp_kreiss_constant_mean{{{RUN}}}", "{{run}} mean"),
        ),
        lines(
            "Largest spectral norm of the weights",
            "Largest spectral norm of a weight matrix, in the blocks and outside them. It is no spectrum of a block, "
            "but on our runs it warned better than the spectra did (docs/science.md has the figures).",
            "none",
            (f"rksp_weight_norm_max{{{RUN}}}", "{{run}} blocks"),
            (f"rksp_weight_norm_head{{{RUN}}}", "{{run}} outside the blocks"),
        ),
        lines(
            "Non-normality",
            "Henrici departure of the largest layer, 0 to 1: 0 is a normal operator.",
            "percentunit",
            (f"rksp_henrici_departure_ratio{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Largest gain of one block",
            "Largest singular value of the whitened operator, and the largest spectral radius, over layers.",
            "none",
            (f"rksp_sigma_max{{{RUN}}}", "{{run}} sigma max"),
            (f"rksp_spectral_radius_max{{{RUN}}}", "{{run}} spectral radius"),
        ),
        lines(
            "Expansive mass",
            "Share of modes that grow, mean over layers.",
            "percentunit",
            (f"rksp_expansive_mass_ratio{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "How far to trust the spectra",
            "Non-linear share of the update (high: a linear operator describes the block badly), and share of modes "
            "that pass the residual filter (low: few are reliable).",
            "percentunit",
            (f"rksp_nonlinearity_ratio{{{RUN}}}", "{{run}} non-linear share"),
            (f"rksp_reliable_modes_ratio{{{RUN}}}", "{{run}} reliable modes"),
        ),
    ]


def checkpoints() -> list[Any]:
    """Whether the watcher keeps up."""
    outcomes = ("processed", "failed", "skipped", "expired")
    duration = "rksp_replay_duration_seconds_bucket"
    return [
        timeline(
            "Runs that cannot be watched",
            "Runs that the watcher has suspended and keeps trying, or whose folder hangs; its log says why.",
            TROUBLE,
            (f"rksp_run_suspended{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Age of the last scan",
            "Time since the folder of each run was last looked through. Rising for one run alone: its file system "
            "hangs.",
            "s",
            (f"time() - rksp_run_last_scan_timestamp_seconds{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Step of the newest result",
            "Training step of the newest checkpoint or profile that was judged. A fall: the trainer went back.",
            "none",
            (f"rksp_checkpoint_last_processed_step{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Checkpoints per minute",
            "Checkpoints and profiles by outcome. Failed ones were retried first; skipped ones are not read, or passed "
            "over by the backlog policy; expired ones were deleted before they could be read.",
            "cpm",
            *[
                (f"60 * rate(rksp_checkpoints_{name}_total{{{RUN}}}[$__rate_interval])", f"{{{{run}}}} {name}")
                for name in outcomes
            ],
        ),
        lines(
            "Backlog",
            "Checkpoints seen and not judged yet. Growing: replay is slower than the run writes.",
            "none",
            (f"rksp_checkpoint_backlog{{{RUN}}}", "{{run}}"),
        ),
        lines(
            "Age of the newest checkpoint",
            "Time since one was last seen, and since one was last judged. Both rise: the trainer writes nothing. "
            "Only the second rises: the watcher is stuck.",
            "s",
            (f"time() - rksp_checkpoint_last_seen_timestamp_seconds{{{RUN}}}", "{{run}} seen"),
            (f"time() - rksp_checkpoint_last_processed_timestamp_seconds{{{RUN}}}", "{{run}} judged"),
        ),
        lines(
            "Replay duration",
            "Time to load a checkpoint, run the probe and compute its spectra. Empty while nothing is replayed; "
            "profiles written by the trainer need no replay.",
            "s",
            *[
                (
                    f"histogram_quantile({share}, sum by (run, le) (rate({duration}{{{RUN}}}[$__rate_interval])))",
                    f"{{{{run}}}} {name}",
                )
                for share, name in (("0.5", "median"), ("0.95", "95 %"))
            ],
        ),
        lines(
            "Replay worker restarts",
            "Restarts of the process that reads checkpoints, per minute: it crashed or ran past its time limit.",
            "cpm",
            (f"60 * rate(rksp_replay_worker_restarts_total{{{RUN}}}[$__rate_interval])", "{{run}}"),
        ),
    ]


def layers() -> list[Any]:
    """Per-layer series, which the watcher exports only when asked."""
    shown = (
        ("Near-unit mass by layer", "Share of modes near the unit circle.", "percentunit", "near_unit_mass_ratio"),
        ("Spectral radius by layer", "Largest |lambda|; often one layer only.", "none", "spectral_radius"),
        ("Kreiss constant by layer", "Worst-case transient growth of each block.", "none", "kreiss_constant"),
    )
    return [
        lines(title, text, unit, (f"rksp_layer_{name}{{{RUN}}}", "{{run}} {{layer}}"))
        for title, text, unit, name in shown
    ]


def _choice(name: str, label: str, query: str) -> Any:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _all_panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every panel, those inside collapsed rows too."""
    for panel in panels:
        yield panel
        yield from panel.get("panels", [])


def main(arguments: list[str]) -> int:
    """Write the dashboard; with ``--check``, return 1 when the committed one is out of date."""
    if arguments == ["--check"]:
        if TARGET.read_text(encoding="utf-8") == build():
            return 0
        print("grafana/rksp.json is out of date: run `python grafana/dashboard.py` and commit it", file=sys.stderr)
        return 1
    TARGET.write_text(build(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
