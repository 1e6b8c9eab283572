"""What is kept between two scrapes changes nothing in their text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rksp_monitor.exposition import FORMATS, Exposition
from rksp_monitor.metrics import METRICS, REPLAY, Board, registry_of

ACCEPTED = (
    "",
    "text/plain;version=1.0.0;escaping=allow-utf-8",
    "application/openmetrics-text;version=1.0.0",
    "application/openmetrics-text;version=1.0.0;escaping=underscores",
)
GAUGES = [each.name for each in METRICS if each.kind == "gauge" and each.layer is None]
COUNTERS = [each.name for each in METRICS if each.kind == "counter"]
RUNS = ("a", 'a "quoted" \\ name\nof two lines', "# HELP\r")

values = st.none() | st.floats(allow_nan=True)
changes = st.lists(
    st.tuples(st.just("set"), st.sampled_from(RUNS), st.sampled_from(GAUGES), values)
    | st.tuples(st.just("count"), st.sampled_from(RUNS), st.sampled_from(COUNTERS), st.integers(0, 9))
    | st.tuples(st.just("observe"), st.sampled_from(RUNS), st.just(REPLAY), st.floats(0.0, 1e3))
    | st.tuples(st.just("anew"), st.sampled_from(RUNS), st.just(""), st.none())
    | st.tuples(st.just("scrape"), st.sampled_from(ACCEPTED), st.just(""), st.none()),
    max_size=30,
)


def a_board() -> Board:
    board = Board({"version": "1"})
    for run in RUNS:
        board.add_run(run, {"model": f"of {run}"})
    return board


def change(board: Board, what: str, run: str, name: str, value: float | None) -> None:
    if what == "set":
        board.set(run, name, value)
    elif what == "count":
        board.count(run, name, int(value or 0))
    elif what == "observe":
        board.observe_replay(run, value or 0.0)
    else:
        board.remove_run(run)
        board.add_run(run, {"model": "another"})


@given(changes)
def test_the_text_is_what_the_library_writes(history: list[tuple[str, str, str, float | None]]):
    board = a_board()
    registry = registry_of(board)
    exposition = Exposition(registry)
    for what, target, name, value in [*history, *(("scrape", accepted, "", None) for accepted in ACCEPTED)]:
        if what == "scrape":
            encode, content_type = choose_encoder(target)
            assert exposition.text(encode, content_type) == encode(registry)
        else:
            change(board, what, target, name, value)


def test_only_what_changed_is_encoded_again():
    board, given = a_board(), list[float]()
    encode, content_type = choose_encoder("")

    def encode_and_note(families: Collector) -> bytes:
        given.extend(sample.value for family in families.collect() for sample in family.samples)
        return encode(families)

    exposition = Exposition(registry_of(board))
    board.set("a", GAUGES[0], 1.0)
    exposition.text(encode_and_note, content_type)
    given.clear()
    board.set("a", GAUGES[0], 1.0)  # no change
    board.set("a", GAUGES[1], 2.0)
    board.count("a", COUNTERS[0], 3)
    exposition.text(encode_and_note, content_type)
    assert given == [2.0, 3.0]


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_samples_that_a_format_moves_elsewhere_are_left_to_the_library(accepted: str):
    registry = CollectorRegistry()
    Counter("asked", "With the time it began.", ["who"], registry=registry).labels("a").inc()
    Histogram("took", "With it, too.", registry=registry).observe(math.inf)
    encode, content_type = choose_encoder(accepted)
    exposition = Exposition(registry)
    assert exposition.text(encode, content_type) == exposition.text(encode, content_type) == encode(registry)


def test_a_client_that_asks_for_many_formats_fills_no_memory():
    exposition = Exposition(registry_of(a_board()))
    for minor in range(20):
        encode, content_type = choose_encoder(f"application/openmetrics-text;version=1.{minor}.0")
        exposition.text(encode, content_type)
    assert len(exposition._known) == FORMATS
