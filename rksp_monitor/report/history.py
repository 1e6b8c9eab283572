"""A history as a table for a terminal, as CSV, JSON or Parquet; all but the table are written row by row."""

# ruff: noqa: RUF001 - the Greek letters are the paper's symbols

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import BinaryIO, Literal

from rich.cells import cell_len
from rich.text import Text

from rksp_core.drift import Against
from rksp_core.errors import ConfigError, RkspError
from rksp_core.features import DISTANCES, FEATURES
from rksp_core.orders import Levers, timestamp
from rksp_core.policy import LEVELS, Decision, Evidence
from rksp_monitor.history import BESIDE, FIGURES, SCHEMA, History, Row, Selection
from rksp_monitor.printable import counted, printable
from rksp_monitor.report.columns import MISSING, fixed, share
from rksp_monitor.report.drawing import GAP, draw, fitting, table

Format = Literal["table", "csv", "json", "parquet"]
Kind = Literal["text", "whole", "number", "truth", "time"]
Cell = str | int | float | bool | None

_ORDER: dict[str, Kind] = {f.name: "text" if f.name == "variant" else "number" for f in dataclasses.fields(Levers)}
_AGAINST: tuple[Against, ...] = ("baseline", "trailing", "reference")

# What a row of CSV or Parquet holds.
COLUMNS: dict[str, Kind] = {
    "kind": "text",
    "step": "whole",
    "status": "text",
    "attempts": "whole",
    "error": "text",
    "path": "text",
    "seen": "time",
    "judged": "time",
    "set_aside": "truth",
    "late": "truth",
    "level": "whole",
    "previous_level": "whole",
    "fired": "text",
    **{f"order_{name}": kind for name, kind in _ORDER.items()},
    "rollback_to": "whole",
    "hold_by": "text",
    "hold_reason": "text",
    **dict.fromkeys((*FIGURES, *BESIDE), "number"),
    **{
        f"{feature}_{what}_{against}": "number"
        for feature in (*FEATURES, *DISTANCES)
        for against in _AGAINST
        for what in ("from", "sigmas_from")
    },
}

DOCUMENTS = ("profile", "evidence", "decision")
BATCH = 1000  # rows of a Parquet row group


def flat(row: Row) -> dict[str, Cell]:
    """Return a row as `COLUMNS`: one value or None each; times in seconds since the epoch.

    Raises
    ------
    ConfigError
        When its documents are none: somebody changed the export.
    """
    try:
        return _flat(row)
    except (LookupError, TypeError, ValueError, AttributeError, RkspError) as error:
        what = printable(repr(error))
        raise ConfigError(
            f"what is kept of {row.kind} {row.step} cannot be read ({what}); export it anew, from its ledger"
        ) from error


def _flat(row: Row) -> dict[str, Cell]:
    cells: dict[str, Cell] = dict.fromkeys(COLUMNS)
    cells |= {name: getattr(row, name) for name in list(COLUMNS)[:9]}
    cells |= row.figures
    if row.decision is not None:
        decision = Decision.from_dict(row.decision)
        cells |= {name: getattr(decision, name) for name in ("late", "level", "previous_level", "rollback_to")}
        cells["fired"] = " ".join(decision.fired)
        if decision.order is not None:
            cells |= {f"order_{name}": getattr(decision.order, name) for name in _ORDER}
        if decision.hold is not None:
            cells |= {"hold_by": decision.hold.by, "hold_reason": decision.hold.reason}
    if row.evidence is not None:
        drift = Evidence.from_dict(row.evidence).drift
        for feature in (*FEATURES, *DISTANCES):
            for against in _AGAINST:
                cells[f"{feature}_from_{against}"] = drift.moved(feature, against)
                cells[f"{feature}_sigmas_from_{against}"] = drift.sigmas(feature, against)
    return cells


def to_csv(history: History, selection: Selection) -> Iterator[str]:
    """Yield the lines of a CSV with a heading; times as ISO 8601, an unknown value as an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in history.rows(selection):
        cells = flat(row)
        times = {name: cells[name] for name, kind in COLUMNS.items() if kind == "time"}
        writer.writerow(
            cells | {name: timestamp(value) for name, value in times.items() if isinstance(value, int | float)}
        )
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def to_json(history: History, selection: Selection) -> Iterator[str]:
    """Yield the parts of one document, as ``schemas/history.json`` describes it, a row a line."""
    head = {"schema": SCHEMA, "run": history.run, "complete": history.covers(selection)}
    yield json.dumps(head)[:-1] + ', "rows": ['
    separator = "\n"
    for row in history.rows(selection):
        yield separator + json.dumps(row.to_dict(), allow_nan=False)
        separator = ",\n"
    yield "\n]}\n"


def write_parquet(history: History, selection: Selection, stream: BinaryIO) -> None:
    """Write a Parquet file: `COLUMNS`, times in UTC, and `DOCUMENTS` as JSON texts.

    Raises
    ------
    ConfigError
        When PyArrow is not installed.
    """
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("Parquet needs PyArrow, which is not installed: pip install 'rksp[parquet]'") from error
    types = {
        "text": pa.string(),
        "whole": pa.int64(),
        "number": pa.float64(),
        "truth": pa.bool_(),
        "time": pa.timestamp("ms", tz="UTC"),
    }
    fields = [(name, types[kind]) for name, kind in COLUMNS.items()]
    schema = pa.schema([*fields, *((name, pa.string()) for name in DOCUMENTS)])
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for rows in _batches(history.rows(selection)):
            writer.write_table(pa.Table.from_pylist([_typed(row) for row in rows], schema))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def _typed(row: Row) -> dict[str, Cell | datetime]:
    cells: dict[str, Cell | datetime] = {**flat(row)}
    for name, kind in COLUMNS.items():
        value = cells[name]
        if kind == "time" and isinstance(value, int | float):
            cells[name] = datetime.fromtimestamp(value, UTC)
        elif kind == "number" and isinstance(value, int):
            cells[name] = float(value)
    documents = {name: getattr(row, name) for name in DOCUMENTS}
    return cells | {name: None if value is None else json.dumps(value) for name, value in documents.items()}


# -- the table

Show = Callable[[dict[str, Cell]], str]


def _of(name: str, form: Callable[[float | None], str]) -> Show:
    def show(cells: dict[str, Cell]) -> str:
        value = cells[name]
        return form(value if isinstance(value, int | float) else None)

    return show


def _change(name: str) -> Show:
    def show(cells: dict[str, Cell]) -> str:
        value, sigmas = cells[f"{name}_from_trailing"], cells[f"{name}_sigmas_from_trailing"]
        if not isinstance(value, int | float):
            return MISSING
        noise = f" ({sigmas:+.1f})" if isinstance(sigmas, int | float) else ""
        return f"{value:+.2f}{noise}"

    return show


def _judged(cells: dict[str, Cell]) -> str:
    judged = cells["judged"]
    return (
        datetime.fromtimestamp(judged, UTC).strftime("%m-%d %H:%M:%S") if isinstance(judged, int | float) else MISSING
    )


def _level(cells: dict[str, Cell]) -> str:
    level = cells["level"]
    if not isinstance(level, int):
        return MISSING
    return LEVELS[level] + ("*" if level != cells["previous_level"] else "")


def _order(cells: dict[str, Cell]) -> str:
    return order_in_short({name: cells[f"order_{name}"] for name in _LEVERS}, cells["rollback_to"])


_LEVERS = {"alpha": "", "clip": "clip ", "learning_rate_scale": "lr x", "surprise": "surprise "}


def order_in_short(levers: Mapping[str, Cell], rollback_to: Cell) -> str:
    """Return what is ordered: alpha, then the levers beside it, then whereto the trainer is sent back."""
    asked = [f"{text}{value:g}" for name, text in _LEVERS.items() if (value := levers[name]) is not None]
    asked += [] if rollback_to is None else [f"back to {rollback_to}"]
    return ", ".join(asked) or MISSING


def _note(cells: dict[str, Cell]) -> str:
    if cells["kind"] == "hold":
        held = cells["hold_by"] is not None
        return printable(
            f"by {cells['hold_by'] or 'nobody named'}: {cells['hold_reason']}" if held else "the hold ended"
        )
    marks = [name.replace("_", " ") for name in ("set_aside", "late") if cells[name]]
    status = [] if cells["status"] == "done" else [str(cells["status"])]
    return printable(", ".join([*status, *marks, *(str(cells[name]) for name in ("error", "fired") if cells[name])]))


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table: heading, what it means, how a row reads, and how soon it goes where there is no room."""

    heading: str
    meaning: str
    show: Show
    rank: int = 0
    right: bool = True


SHOWN = (
    Column("step", "training step", lambda cells: str(cells["step"])),
    Column(
        "kind",
        "a replayed checkpoint, the trainer's profile, or a person's hold",
        lambda cells: str(cells["kind"]),
        right=False,
    ),
    Column("judged, UTC", "month, day and time", _judged, 6, right=False),
    Column("near", "near-unit mass, mean over layers", _of("near_unit_mass_mean", share), 7),
    Column("min", "near-unit mass of the least layer", _of("near_unit_mass_min", share), 2),
    Column("Δmin (σ)", "change from the trailing average (in its noise)", _change("near_unit_mass_min"), 3),
    Column("K", "Kreiss constant, mean over layers", _of("kreiss_constant_mean", fixed), 4),
    Column("Δlog K (σ)", "change of its logarithm, likewise", _change("log_kreiss_mean"), 5),
    Column("σmax", "largest singular value", _of("sigma_max", fixed), 8),
    Column("Henr", "largest Henrici departure from normality, 0..1", _of("henrici_departure_max", share), 9),
    Column("expan", "expansive mass, mean over layers", _of("expansive_mass_mean", share), 11),
    Column("ρ", "largest spectral radius", _of("spectral_radius_max", fixed), 10),
    Column("level", "risk (* it changed)", _level, right=False),
    Column(
        "order",
        "KSS weight and other levers; of a watcher that observes (enforce: false), what it would have ordered",
        _order,
        1,
        right=False,
    ),
    Column("note", "what became of it, and the rules that fired", _note, right=False),
)
NOTE = 24  # letters that the last column has at least, and a third of a wide terminal


def to_table(history: History, rows: Iterable[Row], *, width: int = 120, colour: bool = False) -> str:
    """Return the rows by step in plain or coloured text, and below what the columns mean.

    Columns that do not fit ``width`` letters are left out; CSV and JSON have them all.
    """
    order = ("checkpoint", "profile", "hold").index  # what a person says at a step follows from what was seen there
    cells = [(row.step, order(row.kind), row.judged or row.seen or 0.0, row.set_aside, flat(row)) for row in rows]
    cells.sort(key=lambda cell: cell[:3])
    texts = [[column.show(each) for column in SHOWN] for *_, each in cells]
    room = max(NOTE, width // 3)
    short = [[*text[:-1], text[-1][:room]] for text in texts]
    shown = fitting([column.heading for column in SHOWN], [column.rank for column in SHOWN], short, width)
    rows_table = table([(SHOWN[index].heading, SHOWN[index].right) for index in shown])
    beside = sum(max(map(cell_len, (SHOWN[index].heading, *(text[index] for text in texts)))) for index in shown[:-1])
    note = rows_table.columns[-1]
    note.no_wrap, note.overflow, note.max_width = False, "fold", max(NOTE, width - beside - GAP * (len(shown) - 1))
    for (*_, set_aside, _), text in zip(cells, texts, strict=True):
        rows_table.add_row(*(Text(text[index]) for index in shown), style="dim" if set_aside else None)
    meanings = "; ".join(f"{SHOWN[index].heading}: {SHOWN[index].meaning}" for index in shown)
    left_out = ", ".join(column.heading for index, column in enumerate(SHOWN) if index not in shown)
    hint = f"; left out for want of room: {left_out}" if left_out else ""
    legend = Text(f"run {printable(history.run)}: {counted(len(cells), 'event')}. {meanings}{hint}", style="dim")
    return draw([rows_table, legend], rows_table, width, colour)
