"""Paths named by URL, and run folders in fsspec's file systems."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from rksp_core.errors import ConfigError
from rksp_monitor.checkpoints import read_weights
from rksp_monitor.cli import run as run_command
from rksp_monitor.discovery import Scanner, Sighting
from rksp_monitor.remote import as_path, driver_errors, is_local
from tests.core.profiles import profile
from tests.monitor import tiny_model

BUCKET = "memory://bucket/run"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/one", "runs/one"),
        ("/data/a b", "/data/a b"),
        ("file:///data/a%20b", "/data/a b"),
        ("file://localhost/data", "/data"),
        ("file:///data/a#1?b", "/data/a#1?b"),
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


def test_a_file_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match="a folder of this one is file:///data/run"):
        as_path("file://data/run")


def test_an_unknown_scheme_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="there is no memry://; did you mean memory://"):
        as_path("memry://bucket/run")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A local run folder with a file, a folder, two profiles, and things that are none of our business."""
    torch.save(tiny_model.weights(3), tmp_path / "step-3.pt")
    tiny_model.save_folder(tmp_path, 5)
    (tmp_path / "checkpoints" / "optimizer-5.pt").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("run_id: one")
    (tmp_path / "profiles").mkdir()
    for step in (4, 10):
        profile(step=step).save(tmp_path / "profiles" / f"step-{step:08d}.json")
    return tmp_path


@pytest.fixture
def bucket(run: Path) -> Iterator[MemoryFileSystem]:
    """The same in a bucket."""
    system = fsspec.filesystem("memory", use_listings_cache=False)
    system.put(f"{run}/", "/bucket/run/", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def calls(bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to the bucket, each of which would be a request to a server."""
    names: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(bucket, name)

        def call(*arguments: Any, **options: Any) -> Any:
            names.append(name)
            return real(*arguments, **options)

        return call

    for name in ("ls", "info", "open"):
        monkeypatch.setattr(bucket, name, counted(name))
    return names


def seen(sightings: list[Sighting], folder: Path) -> list[tuple[object, ...]]:
    return [(str(s.path).removeprefix(f"{folder}/"), s.format, s.kind, s.step, s.complete) for s in sightings]


@pytest.mark.usefixtures("bucket")
def test_the_same_is_seen_in_a_folder_in_a_file_url_and_in_a_bucket(run: Path):
    scanner = Scanner(run, settle=0)
    scanner.scan()
    local = seen(scanner.scan(), run)
    assert [step for _, _, _, step, _ in local] == [3, 4, 5, 10]
    assert all(complete for *_, complete in local)
    through_url = Scanner(as_path(run.as_uri()), settle=0)
    through_url.scan()
    assert seen(through_url.scan(), run) == local
    bucket = as_path(BUCKET)
    assert seen(Scanner(bucket, settle=3600).scan(), bucket) == local  # objects appear whole: nothing to settle


def test_a_bucket_that_is_not_there_holds_nothing():
    assert Scanner(as_path("memory://nowhere/run")).scan() == []


def test_an_idle_bucket_costs_one_listing_a_folder(calls: list[str]):
    scanner = Scanner(as_path(BUCKET))
    assert len(scanner.scan()) == 4
    scanner.scan()
    calls.clear()
    scanner.scan()
    listings = 3  # the run, its checkpoints/ and its profiles/
    assert calls.count("open") == 0
    assert len(calls) <= listings + 6  # what one folder of a step costs when its turn comes


def test_what_is_written_again_in_a_bucket_is_another_one(run: Path, bucket: MemoryFileSystem):
    scanner = Scanner(as_path(BUCKET))
    before = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    bucket.put_file(str(run / "step-3.pt"), "/bucket/run/step-3.pt")
    weights = run / "checkpoints" / "step-00000005" / "model.safetensors"
    bucket.put_file(str(weights), "/bucket/run/checkpoints/step-00000005/model.safetensors")
    after = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    assert {step for step in after if after[step] != before[step]} == {3, 5}


class DriverError(Exception):
    """Stands for botocore's and aiohttp's errors, which are no OSError."""


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), PermissionError(13, "Forbidden"), DriverError("503 Slow\nDown")]
)
def test_a_remote_that_fails_is_an_oserror_until_it_works_again(
    bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    scanner = Scanner(as_path(BUCKET))
    before = scanner.scan()

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(bucket, "ls", fails)
        with pytest.raises(
            OSError, match=r"timed out|Forbidden|bucket/run cannot be reached \(DriverError: 503 Slow Down\)"
        ):
            scanner.scan()
    assert scanner.scan() == before


@pytest.mark.parametrize(
    "argv",
    [["doctor"], ["history"], ["control", "status"], ["control", "hold", "--reason", "x"], ["watch", "--once"]],
    ids=" ".join,
)
def test_a_remote_that_refuses_us_is_one_sentence(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class ClientError(Exception):
        """An error of the driver's own, as botocore's."""

    def refuse(*_: object, **__: object) -> None:
        raise ClientError("An error occurred (403)\nForbidden")

    for name in ("ls", "info", "_open"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    assert run_command([*argv, BUCKET, "--state-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "ClientError: An error occurred (403) Forbidden" in said.out + said.err
    assert "raceback" not in said.err


def test_errors_of_a_local_path_are_left_alone():
    with pytest.raises(DriverError), driver_errors(Path("x")):
        raise DriverError


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("name", ["step-3.pt", "checkpoints/step-00000005"])
def test_weights_are_read_from_a_bucket(run: Path, name: str):
    local, remote = read_weights(run / name), read_weights(as_path(BUCKET) / name)
    assert set(local) == set(remote)
    assert all(torch.equal(local[key], remote[key]) for key in local)
