"""What the watcher's log says, and that it says it to readers of every kind: programs, persons, nobody."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from rksp_monitor import log
from rksp_monitor.log import Once, Stream, make_logger


def test_an_exception_is_one_line_of_json_without_the_values_of_variables(capsys: pytest.CaptureFixture[str]):
    secret = "s3cret" * 10
    try:
        raise ValueError(len(secret))
    except ValueError:
        make_logger().exception("unexpected", step=3)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    said = json.loads(line)
    assert (said["event"], said["step"], said["exception"][0]["exc_type"]) == ("unexpected", 3, "ValueError")
    assert "s3cret" not in line


EVIL = 'step-1\n{"event": "order"}\r\x1b[31m\u2028.pt'

SAYING = f"""
from pathlib import Path
from rksp_monitor.log import make_logger
log = make_logger()
log.debug("not said")
log.warning("failed", path=Path({EVIL!r}), name={EVIL!r}, nested={{"a": [{EVIL!r}]}}, step=3)
log.warning({EVIL!r}, **{{{EVIL!r}: 1}})
try:
    raise ValueError({EVIL!r})
except ValueError:
    log.exception("unexpected")
"""


def on_a_terminal(code: str, **environment: str) -> bytes:
    """Return what a process writes to its stderr, a pseudo-terminal."""
    here, there = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=there, env=os.environ | environment)
    os.close(there)
    said = b""
    try:
        while read := os.read(here, 65536):
            said += read
    except OSError:  # the other side is closed: the end of the file, on Linux
        pass
    os.close(here)
    assert process.wait(30) == 0
    return said.replace(b"\r\n", b"\n")


def test_names_cannot_write_records_into_json():
    said = subprocess.run([sys.executable, "-c", SAYING], capture_output=True, check=True).stderr.decode()
    records = [json.loads(line) for line in said.splitlines()]
    assert [record["event"] for record in records] == ["failed", EVIL, "unexpected"]
    assert (records[0]["path"], records[0]["name"], records[0]["nested"]) == (EVIL, EVIL, {"a": [EVIL]})
    assert said.isascii()


def test_names_cannot_write_records_or_colours_to_a_terminal():
    said = on_a_terminal(SAYING, NO_COLOR="1").decode()
    assert said.count("\n") == 3
    assert "\x1b" not in said
    assert "\r" not in said
    assert "\u2028" not in said
    assert [re.search(r"\[(\w+)", line)[1] for line in said.splitlines()] == ["warning", "warning", "error"]
    assert re.search(r"error=.ValueError: .*<string>:9 <module>", said.splitlines()[2])


def test_colours_are_for_terminals_that_want_them():
    assert b"\x1b[" in on_a_terminal(SAYING, NO_COLOR="")
    assert b"\x1b[" not in on_a_terminal(SAYING, NO_COLOR="1")


@pytest.mark.parametrize(("level", "said"), [("debug", 3), ("info", 2), ("WARNING", 1), (30, 1), ("error", 0)])
def test_levels(level: int | str, said: int, capsys: pytest.CaptureFixture[str]):
    logger = make_logger(level)
    for name in ("debug", "info", "warning"):
        getattr(logger, name)("x")
    assert capsys.readouterr().err.count("\n") == said


SAYING_MUCH = """
import time
from rksp_monitor.log import make_logger
log = make_logger()
for n in range(50):
    log.info("x", n=n)
    time.sleep(0.002)
print("done")
"""


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_a_stderr_that_takes_nothing_stops_nobody(redirection: str):
    process = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "", sys.executable, "-c", SAYING_MUCH], capture_output=True
    )
    assert (process.returncode, process.stdout) == (0, b"done\n")


def test_a_reader_who_stops_reading_holds_the_watcher_up_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log, "PATIENCE", 0.2)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "w") as stream:
        said = Stream(stream)
        for n in range(1000):  # would never end if each one waited for ever, or for `PATIENCE`
            said.msg(f"{n} " + "x" * 6000)
        os.set_blocking(reader, False)
        before = pipe.read().decode()
        said.msg("1000 again")
        said.msg("1001 and again")
        after = pipe.read().decode()
    whole = [int(line.split()[0]) for line in before.splitlines() if len(line.split(" ")[-1]) == 6000]
    assert whole == list(range(len(whole)))
    lines = after.splitlines()
    # The torn record is closed by a line break of its own.
    assert re.fullmatch(r"\((\d+) records before this one were lost\)", lines[-3])
    assert int(re.search(r"\d+", lines[-3])[0]) == 1000 - len(whole)
    assert lines[-2:] == ["1000 again", "1001 and again"]


def test_a_long_record_is_written_whole_to_a_slow_reader():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys, time; time.sleep(0.3); print(len(sys.stdin.read()))"],
            stdin=reader,
            stdout=subprocess.PIPE,
        )
        os.close(reader)
        Stream(stream).msg("é" * 100_000)
    assert int(process.communicate(timeout=30)[0]) == 100_001


def test_once():
    once = Once()
    assert [once("a"), once("a"), once(("b", 1))] == [True, False, True]
    once.forget("a")
    assert once("a")


def test_once_forgets_in_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log, "REMEMBERED", 2)
    once = Once()
    assert [once(key) for key in "abca"] == [True, True, True, True]
