"""What became of a run, read beside its watcher, after it, and from an export; nothing is written where it is read."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from rksp_core.drift import DriftState, measure
from rksp_core.errors import ConfigError
from rksp_core.orders import Levers, Reason
from rksp_core.policy import Decision, Evidence, Hold, PolicyState, decide
from rksp_monitor.cli import run
from rksp_monitor.commands.history import history
from rksp_monitor.discovery import Sighting
from rksp_monitor.history import Row, Selection, read_history, read_states
from rksp_monitor.ledger import Ledger, Outcome, open_ledger
from rksp_monitor.policy_replay import replay
from rksp_monitor.report.drawing import fitting
from rksp_monitor.report.history import SHOWN, to_table
from tests.core.policies import MASSES
from tests.core.profiles import profile

STEPS = (0, 50, 100, 150)


def watched(folder: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """Fill the ledger of a run whose near-unit mass falls: judged profiles, one failed and one waiting checkpoint."""
    path = folder / ".rksp" / f"{folder.name}.sqlite3"
    now = iter(range(1000, 9000))
    with open_ledger(path, folder.name, clock=lambda: float(next(now))) as ledger:
        judge(ledger, folder, steps)
        for step, problem in ((60, "the weights do not fit, at =all"), (160, "")):
            ledger.record(Sighting(folder / f"step-{step}", "folder", "checkpoint", step, "f", True))
            event = ledger.next_ready("checkpoint")
            if problem:
                ledger.claim(event)
                ledger.close_event(event, "failed", problem)
    return path


def judge(ledger: Ledger, folder: Path, steps: tuple[int, ...]) -> None:
    drift_state: DriftState | None = None
    state = PolicyState()
    for step in steps:
        ledger.record(Sighting(folder / f"{step}.json", "profile_file", "profile", step, "f", True))
        event = ledger.next_ready("profile")
        ledger.claim(event)
        found = profile(near_unit_mass=0.9 - step / 200, step=step, loss=2.5, layers=2)
        drift_state, drift = measure(drift_state, found, step)
        evidence = Evidence(drift, 1000.0 + step, series="profile")
        state, decision = decide(state, evidence, MASSES)
        outcome = Outcome(found.to_dict(), evidence.to_dict(), decision.to_dict())
        ledger.finish(event, outcome, {"policy": state.to_dict()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    watched(made)
    return made


def printed(*argv: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert run(["history", *map(str, argv)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


class TestReading:
    """Rows of a ledger."""

    def test_rows_come_in_the_order_they_were_judged(self, folder: Path):
        found = read_history(folder)
        assert found.run == "run"
        rows = list(found.rows())
        assert [(row.kind, row.step, row.status) for row in rows] == [
            *(("profile", step, "done") for step in STEPS),
            ("checkpoint", 60, "failed"),
            ("checkpoint", 160, "ready"),
        ]
        assert [row.judged is None for row in rows] == [False] * 4 + [True] * 2
        assert rows[4].error == "the weights do not fit, at =all"
        assert rows[4].profile is rows[4].decision is None

    def test_a_row_has_the_whole_story(self, folder: Path):
        row = list(read_history(folder).rows())[3]
        assert row.figures["near_unit_mass_min"] == pytest.approx(0.15)
        assert row.figures["loss"] == 2.5
        assert row.profile["layers"][1]["layer"] == "h.1"
        assert Evidence.from_dict(row.evidence).drift.from_baseline("near_unit_mass_mean") == pytest.approx(-0.75)
        assert row.decision["fired"] == ["mass_falls"]
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row

    @pytest.mark.parametrize(
        ("selection", "steps"),
        [
            (Selection(kind="checkpoint"), [60, 160]),
            (Selection(statuses=("failed", "ready")), [60, 160]),
            (Selection(from_step=100), [100, 150, 160]),
            (Selection(to_step=60), [0, 50, 60]),
            (Selection(kind="profile", statuses=("failed",)), []),
        ],
    )
    def test_rows_can_be_selected(self, folder: Path, selection: Selection, steps: list[int]):
        found = read_history(folder)
        assert [row.step for row in found.rows(selection)] == steps
        assert [row.step for row in found.rows() if selection.admits(row)] == steps

    def test_what_was_set_aside_is_left_out_unless_asked_for(self, folder: Path):
        database = sqlite3.connect(folder / ".rksp" / "run.sqlite3")
        database.execute("UPDATE events SET set_aside = 1 WHERE step >= 100")
        database.commit()
        database.close()
        assert [row.step for row in read_history(folder).rows(Selection())] == [0, 50, 60]
        assert len(list(read_history(folder).rows())) == 6

    def test_a_ledger_of_the_first_version_lacks_what_was_not_kept(self, folder: Path):
        path = folder / ".rksp" / "run.sqlite3"
        database = sqlite3.connect(path)
        database.execute("DROP INDEX events_kept")
        for column in ("judged", "evidence", "decision", "set_aside"):
            database.execute(f"ALTER TABLE events DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 1")
        database.commit()
        database.close()
        rows = list(read_history(path).rows())
        assert [row.step for row in rows] == [*STEPS, 60, 160]
        assert [row.judged is None for row in rows] == [False] * 4 + [True] * 2
        assert {(row.decision, row.evidence, row.set_aside) for row in rows} == {(None, None, False)}
        assert rows[0].figures["near_unit_mass_mean"] == pytest.approx(0.9)

    def test_states_are_there_by_name(self, folder: Path):
        assert PolicyState.from_dict(read_states(folder / ".rksp" / "run.sqlite3", "run")["policy"]).step == 150
        assert read_states(folder / "nowhere.sqlite3", "run") == {}


WATCHING = """
import sys, time
from pathlib import Path
from tests.monitor.test_history import judge
from rksp_monitor.ledger import open_ledger
folder = Path(sys.argv[1])
with open_ledger(folder / ".rksp" / "run.sqlite3", "run") as ledger:
    judge(ledger, folder, (0, 50))
    print("open", flush=True)
    time.sleep(60)
"""


class TestBesideAWatcher:
    """Neither its files nor its folder change by being read."""

    def test_a_ledger_at_rest_is_left_as_it_was(self, folder: Path):
        before = {path.name: path.stat().st_mtime_ns for path in (folder / ".rksp").iterdir()}
        assert len(list(read_history(folder).rows())) == 6
        assert {path.name: path.stat().st_mtime_ns for path in (folder / ".rksp").iterdir()} == before

    def test_one_that_is_written_and_one_whose_watcher_was_killed(self, tmp_path: Path):
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHING, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        path = tmp_path / ".rksp" / "run.sqlite3"
        try:
            assert process.stdout.readline() == "open\n"
            assert [row.step for row in read_history(path).rows()] == [0, 50]
            rows = read_history(path).rows()
            next(rows)  # a reader in the middle does not hold a writer up
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        rows.close()
        assert path.with_name("run.sqlite3-wal").stat().st_size > 0  # nothing had been moved into the file itself
        assert [row.step for row in read_history(path).rows()] == [0, 50]
        with open_ledger(path, "run") as ledger:
            assert ledger.counts()["done"] == 2

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_that_may_not_be_written(self, folder: Path):
        (folder / ".rksp").chmod(0o500)
        assert len(list(read_history(folder).rows())) == 6


class TestExports:
    """Each format says the same."""

    def test_json_is_as_its_schema_says_and_is_read_again(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        path = tmp_path / "history.json"
        printed(folder, "--format", "json", "--all", "--output-file", path, capsys=capsys)
        document = json.loads(path.read_text())
        schema = json.loads((files("rksp_monitor") / "schemas" / "history.json").read_text())
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(document)
        assert set(schema["$defs"]["row"]["properties"]) == set(document["rows"][0])
        again, original = read_history(path), read_history(folder)
        assert (again.run, again.complete) == ("run", True)
        assert list(again.rows()) == list(original.rows())
        assert printed(path, "--format", "json", "--all", capsys=capsys) == path.read_text()

    def test_an_export_of_a_part_says_so(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        for flags in (["--from-step", "50"], ["--all", "--kind", "checkpoint"]):
            assert not json.loads(printed(folder, "--format", "json", *flags, capsys=capsys))["complete"]
        for flags in ([], ["--kind", "profile"]):  # checkpoints were not judged
            assert json.loads(printed(folder, "--format", "json", *flags, capsys=capsys))["complete"]
        database = sqlite3.connect(folder / ".rksp" / "run.sqlite3")
        database.execute("UPDATE events SET set_aside = 1 WHERE step = 100")
        database.commit()
        database.close()
        for flags in ([], ["--all"]):
            document = json.loads(printed(folder, "--format", "json", *flags, capsys=capsys))
            assert document["complete"] is bool(flags)

    def test_csv_has_a_line_a_row(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        rows = list(csv.DictReader(io.StringIO(printed(folder, "--format", "csv", capsys=capsys))))
        assert [int(row["step"]) for row in rows] == [*STEPS, 60, 160]
        assert float(rows[3]["near_unit_mass_mean_from_baseline"]) == pytest.approx(-0.75)
        assert rows[3]["level"] == "1"
        assert rows[3]["fired"] == "mass_falls"
        assert rows[4]["error"] == "the weights do not fit, at =all"
        assert (rows[4]["level"], rows[4]["judged"]) == ("", "")
        assert rows[0]["judged"].endswith("Z")

    def test_parquet_holds_what_csv_does(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        parquet = pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed")
        path = tmp_path / "history.parquet"
        printed(folder, "--format", "parquet", "--output-file", path, capsys=capsys)
        rows = parquet.read_table(path).to_pylist()
        lines = list(csv.DictReader(io.StringIO(printed(folder, "--format", "csv", capsys=capsys))))
        assert [name for name in rows[0] if name not in ("profile", "evidence", "decision")] == list(lines[0])
        for row, line in zip(rows, lines, strict=True):
            for name in ("step", "near_unit_mass_min", "log_kreiss_mean_from_trailing", "level", "order_alpha"):
                assert line[name] == ("" if row[name] is None else str(row[name]))
        assert rows[0]["judged"].isoformat(timespec="milliseconds").replace("+00:00", "Z") == lines[0]["judged"]
        assert json.loads(rows[3]["decision"])["fired"] == ["mass_falls"]

    def test_the_table_shows_steps_levels_and_troubles(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        lines = printed(folder, capsys=capsys).splitlines()
        assert lines[0].split()[:2] == ["step", "kind"]
        assert [int(line.split()[0]) for line in lines[1:7]] == [0, 50, 60, 100, 150, 160], "by step, not by time"
        assert "failed, the weights do not fit" in lines[3]
        assert "elevated*" in lines[4]
        assert "mass_falls" in lines[4]
        assert lines[7].startswith("run run: 6 events. step: training step; kind: ")
        few = printed(folder, "--status", "failed", "--status", "ready", capsys=capsys).splitlines()
        assert [line.split()[0] for line in few[:4]] == ["step", "60", "160", "run"]
        assert "run run: 1 event. " in printed(folder, "--status", "failed", capsys=capsys)

    def test_a_persons_word_is_in_all_of_them(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        hold = Hold(Levers(alpha=0.3), until=9e9, by="ann", reason="trying KSS")
        with open_ledger(folder / ".rksp" / "run.sqlite3", "run") as ledger:
            for asked, order in ((hold, hold.levers), (None, None)):
                decision = Decision(1, 1, (), order, Reason(1, 150), hold=asked)
                ledger.decree(150, decision.to_dict(), {})
        told = ["150", "hold"]
        lines = [line for line in printed(folder, capsys=capsys).splitlines() if line.split()[:2] == told]
        assert ["0.3" in line and "by ann: trying KSS" in line for line in lines] == [True, False]
        assert lines[1].endswith("the hold ended")
        text = printed(folder, "--format", "csv", "--kind", "hold", capsys=capsys)
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["order_alpha"] for row in rows] == ["0.3", ""]
        assert [(row["hold_by"], row["hold_reason"]) for row in rows] == [("ann", "trying KSS"), ("", "")]
        path = tmp_path / "history.json"
        printed(folder, "--format", "json", "--all", "--output-file", path, capsys=capsys)
        schema = json.loads((files("rksp_monitor") / "schemas" / "history.json").read_text())
        Draft202012Validator(schema).validate(json.loads(path.read_text()))
        again = list(read_history(path).rows(Selection(kind="hold")))
        assert [Decision.from_dict(row.decision).hold for row in again] == [hold, None]
        assert replay(read_history(path), MASSES).differences == [], "a policy is not asked again about them"
        parquet = pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed")
        printed(folder, "--format", "parquet", "--output-file", tmp_path / "all.parquet", capsys=capsys)
        assert [row["hold_by"] for row in parquet.read_table(tmp_path / "all.parquet").to_pylist()][-2:] == [
            "ann",
            None,
        ]

    @pytest.mark.parametrize("width", [60, 80, 120, 200])
    def test_the_table_fits_the_terminal_and_explains_what_it_shows(self, width: int, folder: Path):
        found = read_history(folder)
        text = to_table(found, found.rows(), width=width)
        assert max(map(len, text.splitlines())) <= width
        table, _, legend = text.partition("run run: ")
        headings = table.splitlines()[0]
        for column in SHOWN:
            assert (column.heading in re.split(r"  +", headings)) == (
                f" {column.heading}: " in " ".join(legend.split())
            )
        notes = " ".join(line[headings.index("note") :].strip() for line in table.splitlines())
        assert "failed, the weights do not fit, at =all" in notes, "wrapped, not cut"
        assert ("left out for want of room" in " ".join(legend.split())) == (width < 200)

    def test_columns_that_say_nothing_leave_a_narrow_terminal_first(self):
        headings, ranks = ("step", "empty", "near", "less"), (0, 1, 2, 3)
        rows = [("10", "-", "0.91", "0.1"), ("20", "-", "0.92", "0.2")]
        kept = {
            width: [headings[index] for index in fitting(headings, ranks, rows, width)] for width in (23, 22, 15, 3)
        }
        assert kept[23] == ["step", "empty", "near", "less"]
        assert kept[22] == ["step", "near", "less"]
        assert kept[15] == ["step", "near"]
        assert kept[3] == ["step"]

    def test_thousands_of_rows_go_through_one_at_a_time(self, folder: Path):
        import tracemalloc

        path = folder / ".rksp" / "run.sqlite3"
        database = sqlite3.connect(path)
        names = "run, kind, fingerprint, path, format, status, first_seen, updated, judged, profile, evidence, decision"
        database.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < 2999) "
            f"INSERT INTO events (step, {names}) SELECT i, {names} FROM n, events WHERE step = 150"
        )
        database.commit()
        database.close()
        tracemalloc.start()
        assert sum(1 for _ in read_history(path).rows()) == 2006
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, peak  # the documents of all rows are 10 MiB


def test_of_several_runs_one_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with open_ledger(folder / ".rksp" / "other.sqlite3", "other") as ledger:
        judge(ledger, folder, (7,))
    assert "7  profile" in printed(folder, "--run-id", "other", capsys=capsys)
    says = printed(folder, "--run-id", "third", capsys=capsys, code=2)
    assert "there are those of other, run: name the run with --run-id" in says


def test_a_state_folder_is_looked_into(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rksp_monitor.config import RunSettings
    from rksp_monitor.run import describe_run

    elsewhere = describe_run(folder, RunSettings(), tmp_path / "state").ledger
    elsewhere.parent.mkdir()
    shutil.move(folder / ".rksp" / "run.sqlite3", elsewhere)
    assert "6 events" in printed(folder, "--state-dir", tmp_path / "state", capsys=capsys)
    settings = tmp_path / "watch.yaml"
    settings.write_text(f"state_dir: {tmp_path / 'state'}\nruns: [{{folder: '{tmp_path}/*'}}]\n")
    assert "6 events" in printed(folder, "--config", settings, capsys=capsys)
    assert "with --state-dir" in printed(folder, capsys=capsys, code=2)


def test_what_a_checkpoint_wrote_commands_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]):
    with open_ledger(folder / ".rksp" / f"{folder.name}.sqlite3", folder.name) as ledger:
        ledger.record(Sighting(folder / "step-170", "folder", "checkpoint", 170, "f", True))
        event = ledger.next_ready("checkpoint")
        ledger.claim(event)
        ledger.close_event(event, "failed", "it raised \x1b[2J\r\nOops")
    table = printed(folder, capsys=capsys)
    assert r"it raised \x1b[2J\r\nOops" in table
    assert "\x1b" not in table


MISTAKES = {
    "no ledger": (["{tmp}/nowhere"], "there is no ledger"),
    "a pattern": (["{tmp}/no*"], "is a pattern, and this is about one run"),
    "a line break": (["{tmp}/no\n\x1b[31mwhere.json"], "no\\n\\x1b[31mwhere.json cannot be read"),
    "no such export": (["{tmp}/nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
    "no history": (
        ["{tmp}/other.json"],
        "a history has schema 'rksp.history/1', {tmp}/other.json has 'rksp.profile/1'",
    ),
    "damaged": (["{tmp}/damaged.json"], "is damaged"),
    "damaged documents": (["{tmp}/documents.json"], "what is kept of profile 1 cannot be read"),
    "no database": (["{tmp}/text.sqlite3"], "cannot be read as a ledger (file is not a database)"),
    "parquet on stdout": (["{run}", "--format", "parquet"], "name a file with --output-file"),
    "no folder": (["{run}", "--output-file", "{tmp}/no/x.csv"], "cannot be written"),
    "no state": (["{run}", "--status", "broken"], "'broken' is not one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "other.json").write_text('{"schema": "rksp.profile/1"}')
    (tmp_path / "damaged.json").write_text('{"schema": "rksp.history/1", "run": "r", "rows": [{"step": "seven"}]}')
    row = '{"kind": "profile", "step": 1, "status": "done", "evidence": {}, "decision": {"level": 1}}'
    (tmp_path / "documents.json").write_text(f'{{"schema": "rksp.history/1", "run": "r", "rows": [{row}]}}')
    (tmp_path / "text.sqlite3").write_text("this is no database, and long enough to be read as one" * 100)
    argv, message = MISTAKES[name]
    said = printed(*(argument.format(tmp=tmp_path, run=folder) for argument in argv), capsys=capsys, code=2)
    assert message.format(tmp=tmp_path) in said
    assert said.count("\n") == 1


def test_without_pyarrow_one_sentence_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "history.parquet"
    said = printed(folder, "--format", "parquet", "--output-file", path, capsys=capsys, code=2)
    assert "pip install 'rksp[parquet]'" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_an_export_that_fails_halfway_leaves_what_was_there(folder: Path, tmp_path: Path):
    database = sqlite3.connect(folder / ".rksp" / "run.sqlite3")
    database.execute("UPDATE events SET decision = '{}' WHERE step = 150")
    database.commit()
    database.close()
    path = tmp_path / "history.csv"
    path.write_text("before")
    with pytest.raises(ConfigError, match="what is kept of profile 150"):
        history(str(folder), form="csv", output_file=path)
    assert path.read_text() == "before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["history.csv", "run"]


def test_an_unknown_source_is_no_guess(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no ledger"):
        read_history(tmp_path)
