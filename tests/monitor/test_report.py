"""The report in its four formats, from one real preflight of a small model."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser

import jsonschema
import pytest

from rksp_core.risk import Decision
from rksp_monitor.models import load_model
from rksp_monitor.preflight import PreflightReport, Settings, preflight
from rksp_monitor.probe import random_probe
from rksp_monitor.report import FORMATS, render
from rksp_monitor.report.columns import COLUMNS, number
from rksp_monitor.report.document import schema

MALICE = "<script>alert('|_x_|')</script>"


@pytest.fixture(scope="module")
def report() -> PreflightReport:
    model = load_model("tests.monitor.factories:tiny", arguments={"depth": 4})
    return preflight(model, random_probe(32), Settings(learning_rate=1e-2))


@pytest.fixture(scope="module")
def bare() -> PreflightReport:
    """No look-ahead, layers without an update, an inconclusive decision, text that wants to be markup."""
    model = dataclasses.replace(load_model("tests.monitor.factories:zero_branches"), source=MALICE, warnings=(MALICE,))
    found = preflight(model, random_probe(32, 2, 8), Settings())
    return dataclasses.replace(found, decision=Decision("inconclusive", (MALICE,)))


def test_the_document_follows_its_published_schema(report: PreflightReport, bare: PreflightReport) -> None:
    published = schema()
    jsonschema.Draft202012Validator.check_schema(published)
    for each in (report, bare):
        jsonschema.validate(json.loads(render(each, "json")), published)


def test_the_schema_refuses_another_document(report: PreflightReport) -> None:
    document = report.to_dict()
    document["layers"][0]["near_unit_mass"] = 1.5
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report.to_dict(), "schema": "rksp.preflight/2"}, schema())


def test_every_layer_field_is_in_the_schema(report: PreflightReport) -> None:
    described = set(schema()["$defs"]["layer"]["properties"])
    assert set(report.to_dict()["layers"][0]) == described


def test_the_document_is_strict_json(bare: PreflightReport) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(render(bare, "json"), parse_constant=refuse)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_the_verdict_the_layers_and_the_caveat(report: PreflightReport, form: str) -> None:
    text = render(report, form, width=200)
    plain = text.replace("\\", "").replace("&#39;", "'")
    assert report.decision.verdict in plain.replace("use kss", "use_kss")
    for layer in report.profile.layers:
        assert layer.layer in plain
    assert "not calibrated" in plain


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_report_gives_the_same_text(report: PreflightReport, form: str) -> None:
    assert render(report, form) == render(report, form)


class TestTable:
    """For a terminal."""

    def test_no_colour_unless_asked(self, report: PreflightReport) -> None:
        assert "\x1b" not in render(report, "table")
        assert "\x1b[" in render(report, "table", colour=True)

    def test_a_narrow_terminal_cuts_no_number(self, report: PreflightReport) -> None:
        lines = render(report, "table", width=40).splitlines()
        header = next(line for line in lines if line.startswith("layer"))
        assert all(column.heading in header for column in COLUMNS)
        assert "…" not in "".join(lines)

    def test_text_is_no_markup(self, bare: PreflightReport) -> None:
        loud = dataclasses.replace(bare, warnings=("[bold]x[/bold]",), decision=Decision("inconclusive", ("[red]y",)))
        text = render(loud, "table")
        assert "[bold]x[/bold]" in text
        assert "[red]y" in text


class TestMarkdown:
    """For a pull request."""

    def test_every_row_of_a_table_has_as_many_cells_as_its_header(self, report: PreflightReport) -> None:
        lines = render(report, "markdown").splitlines()
        headers = [i for i, line in enumerate(lines) if line.startswith("|---")]
        assert len(headers) == 3
        for at in headers:
            cells = lines[at].count("|")
            row = at + 1
            while row < len(lines) and lines[row].startswith("|"):
                assert lines[row].replace("\\|", "").count("|") == cells
                row += 1
            assert lines[at - 1].replace("\\|", "").count("|") == cells

    def test_text_is_no_markup(self, bare: PreflightReport) -> None:
        assert MALICE not in render(bare, "markdown")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


class TestHtml:
    """One page that needs nothing else."""

    def test_it_loads_nothing_and_runs_nothing(self, report: PreflightReport) -> None:
        page = _Page()
        page.feed(render(report, "html"))
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "link", "iframe", "object", "embed", "img"}
        for _, attributes in page.tags:
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))

    def test_it_has_the_three_figures_described(self, report: PreflightReport) -> None:
        page = _Page()
        page.feed(render(report, "html"))
        labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
        assert len(labels) == 3
        assert "complex plane" in labels[0]
        assert "masses" in labels[1]
        assert "Kreiss" in labels[2]

    def test_ids_of_the_figures_do_not_clash(self, report: PreflightReport) -> None:
        page = _Page()
        page.feed(render(report, "html"))
        ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
        assert len(ids) == len(set(ids))

    def test_text_is_no_markup(self, bare: PreflightReport) -> None:
        page = render(bare, "html")
        assert "<script>" not in page
        assert "&lt;script&gt;" in page

    def test_a_model_of_one_block_can_be_drawn(self) -> None:
        model = load_model("tests.monitor.factories:tiny", arguments={"depth": 1})
        assert "<svg" in render(preflight(model, random_probe(32), Settings()), "html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (1.0, "1.00"),
        (0.0638, "0.0638"),
        (22.04, "22.0"),
        (2743.4, "2743"),
        (1.5e9, "1.50e+09"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text
