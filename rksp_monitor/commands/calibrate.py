"""``rksp calibrate``: fit the risk model of `rksp preflight` to runs whose outcome is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    outcomes: Annotated[
        list[Path], typer.Argument(metavar="OUTCOMES.jsonl...", help='One run a line, schema "rksp.outcome/1".')
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The risk model to write.")] = Path("risk.json"),
    outcome: Annotated[
        str, typer.Option(help="What `diverged` stands for in these lines, in words: the risk of ...")
    ] = "divergence",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the folds and the bootstrap samples.")] = 0,
) -> int:
    """Fit the probability of divergence to your own runs, for `rksp preflight --risk-model`.

    A line is {"schema": "rksp.outcome/1", "name": ..., "launch": risk.launch of the run's preflight report, "diverged":
    true or false, "horizon": steps}.
    """
    from rksp_core.outcomes import read_outcomes
    from rksp_core.risk_fit import fit
    from rksp_monitor.output_file import require_writable, write_output

    require_writable(output)
    runs = read_outcomes(outcomes)
    model = fit(runs, seed=seed, about={"outcomes": [path.name for path in outcomes], "outcome": outcome})
    write_output(output, model.to_json())
    about = model.about
    print(
        f"{output}: {about['runs']} runs, {outcome} within {model.horizon} steps in {about['diverged']}; AUROC "
        f"{about['auroc_cross_validated']:.3f} on runs left out of the fit, {about['auroc_of_the_learning_rate']:.3f} "
        f"by the learning rate alone; sha256 {model.sha256[:12]}"
    )
    if about["auroc_cross_validated"] <= about["auroc_of_the_learning_rate"]:
        print("rksp: on these runs the learning rate alone does as well; more runs near the edge help", file=sys.stderr)
    return 0
