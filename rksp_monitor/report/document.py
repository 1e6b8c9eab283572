"""The report as one JSON document, as ``schemas/preflight.json`` describes it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rksp_monitor.preflight import PreflightReport


def to_json(report: PreflightReport) -> str:
    """Return strict JSON: no NaN, no infinity; eigenvalues are [re, im] pairs."""
    return json.dumps(report.to_dict(), allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """Return the published JSON Schema of the document."""
    text = (files("rksp_monitor") / "schemas" / "preflight.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))
