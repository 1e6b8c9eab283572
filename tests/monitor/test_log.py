"""What the daemon's log says of an exception: where, not what every variable held."""

from __future__ import annotations

import json

import pytest

from rksp_monitor.log import make_logger


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
