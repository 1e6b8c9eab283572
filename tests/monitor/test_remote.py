"""Paths named by URL, and run folders in fsspec's file systems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rksp_core.errors import ConfigError
from rksp_monitor.remote import as_path, is_local


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/one", "runs/one"),
        ("/data/a b", "/data/a b"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("a:b", "a:b"),
        (Path("x"), "x"),
    ],
)
def test_plain_text_and_file_urls_are_local(text: str | Path, path: str):
    assert as_path(text) == Path(path)
    assert is_local(as_path(text))


def test_another_scheme_gives_a_path_that_its_text_names_again():
    path = as_path("memory://bucket/run") / "step-1"
    assert not is_local(path)
    assert str(path) == "memory://bucket/run/step-1"
    assert as_path(str(path)) == path
    assert as_path(path) is path


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="s3://bucket/run needs a package that is not installed: Install s3fs"):
        as_path("s3://bucket/run")


def test_an_unknown_scheme_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="there is no memry://; did you mean memory://"):
        as_path("memry://bucket/run")
