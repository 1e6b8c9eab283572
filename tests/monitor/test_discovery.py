"""Discovery on a real folder: half-written files, atomic renames, and waking up with and without file events."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rksp_monitor.checkpoints import FORMATS
from rksp_monitor.discovery import FileEvents, Scanner, Sighting, watch
from tests.core.profiles import profile
from tests.monitor import tiny_model


def steps(sightings: list[Sighting], **wanted: bool) -> list[int]:
    return [s.step for s in sightings if all(getattr(s, name) == value for name, value in wanted.items())]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path):
    assert Scanner(tmp_path / "later").scan() == []


def test_steps_come_in_the_order_of_numbers(tmp_path: Path):
    for step in (1000, 999, 20):
        torch.save(tiny_model.weights(step), tmp_path / f"step_{step}.pt")
    assert steps(Scanner(tmp_path, settle=0).scan()) == [20, 999, 1000]


def test_other_state_is_not_seen(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("optimizer-100.pt", ".step-1.safetensors.tmp", "step-5.safetensors.tmp", "training_state.pt"):
        torch.save({}, tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "tmp-checkpoint-9").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1")
    assert Scanner(tmp_path, settle=0).scan() == []


def test_a_weights_file_is_complete_when_two_looks_agree(tmp_path: Path):
    content = save(tiny_model.weights(1))
    path, scanner = tmp_path / "step-1.safetensors", Scanner(tmp_path, settle=0)
    path.write_bytes(content[:1000])
    (half,) = scanner.scan()
    assert not half.complete
    assert "bytes" in half.problem
    path.write_bytes(content)
    (settling,) = scanner.scan()
    assert (settling.complete, settling.settling) == (False, True)
    (ready,) = scanner.scan()
    assert ready.complete


def test_a_file_of_its_final_size_whose_bytes_still_arrive_keeps_settling(tmp_path: Path):
    content = bytearray(save(tiny_model.weights(1)))
    path, scanner = tmp_path / "step-1.safetensors", Scanner(tmp_path, settle=0)
    for n in range(5):
        content[-1] = n
        path.write_bytes(content)
        assert steps(scanner.scan(), complete=True) == []
    assert steps(scanner.scan(), complete=True) == [1]


def test_a_profile_is_complete_at_the_first_look(tmp_path: Path):
    (tmp_path / "profiles").mkdir()
    profile(step=10).save(tmp_path / "profiles" / "step-00000010.json")
    (found,) = Scanner(tmp_path, settle=0).scan()
    assert (found.kind, found.complete) == ("profile", True)


def test_a_checkpoint_that_is_written_again_is_another_one(tmp_path: Path):
    path, scanner = tmp_path / "step-1.safetensors", Scanner(tmp_path, settle=0)
    path.write_bytes(save(tiny_model.weights(1)))
    scanner.scan()
    (first,) = scanner.scan()
    path.unlink()
    path.write_bytes(save(tiny_model.weights(2)))
    scanner.scan()
    (second,) = scanner.scan()
    assert first.complete
    assert second.complete
    assert first.fingerprint != second.fingerprint


def test_what_vanishes_is_not_in_the_next_scan(tmp_path: Path):
    path, scanner = tmp_path / "step-1.safetensors", Scanner(tmp_path, settle=0)
    path.write_bytes(save(tiny_model.weights(1)))
    assert steps(scanner.scan()) == [1]
    path.unlink()
    assert scanner.scan() == []


def test_an_unchanged_file_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "step-1.safetensors").write_bytes(save(tiny_model.weights(1)))
    scanner, checks = Scanner(tmp_path, settle=0), []
    known = FORMATS["safetensors"]
    real = known.is_complete
    monkeypatch.setattr(known, "is_complete", lambda path: (checks.append(path), real(path))[1])
    for _ in range(5):
        scanner.scan()
    assert len(checks) == 2


def first_complete(tmp_path: Path, write, *, events: FileEvents | None, interval: float) -> list[int]:
    """Start watching, write in another thread, and return what becomes complete first."""
    stop, wake = threading.Event(), threading.Event()
    guard = threading.Timer(20, lambda: (stop.set(), wake.set()))
    guard.start()
    writer = None
    try:
        for sightings in watch(Scanner(tmp_path), stop=stop, wake=wake, interval=interval, events=events):
            if done := steps(sightings, complete=True):
                return done
            if writer is None:
                writer = threading.Timer(0.2, write)
                writer.start()
    finally:
        guard.cancel()
    return []


def test_polling_alone_finds_a_checkpoint(tmp_path: Path):
    assert first_complete(tmp_path, lambda: tiny_model.save_folder(tmp_path, 5), events=None, interval=0.2) == [5]


def test_a_file_event_ends_a_long_wait(tmp_path: Path):
    # With an hour between two scans only the event can bring it within the guard's 20 seconds.
    with FileEvents() as events:
        assert first_complete(tmp_path, lambda: tiny_model.save_folder(tmp_path, 5), events=events, interval=3600) == [
            5
        ]


def test_watching_works_where_file_events_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from watchdog.observers import Observer

    def exhausted(self: object, *_: object, **__: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    said: list[str] = []
    monkeypatch.setattr(Observer, "schedule", exhausted)
    with FileEvents(said.append) as events:
        assert first_complete(tmp_path, lambda: tiny_model.save_folder(tmp_path, 5), events=events, interval=0.2) == [5]
    assert len(said) == 1
    assert "inotify watch limit reached" in said[0]


def test_stop_ends_the_generator_at_once(tmp_path: Path):
    stop, wake = threading.Event(), threading.Event()
    scans = watch(Scanner(tmp_path, settle=0), stop=stop, wake=wake, interval=3600)
    next(scans)
    threading.Timer(0.1, lambda: (stop.set(), wake.set())).start()
    assert list(scans) == []


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize("step", ["[]", "Infinity", "1e999", "-5", str(10**30), "true"])
def test_metadata_that_states_no_step_does_not_stop_a_scan(tmp_path: Path, step: str):
    (tmp_path / "model.safetensors").write_bytes(_header(f'{{"__metadata__": {{"step": {step}}}}}'))
    folder = tmp_path / "checkpoints" / "latest"
    tiny_model.save_folder(tmp_path, 5).rename(folder)
    (folder / "checkpoint.json").write_text(f'{{"step": {step}}}')
    assert Scanner(tmp_path, settle=0).scan() == []


def test_metadata_nested_too_deeply_does_not_stop_a_scan(tmp_path: Path):
    folder = tmp_path / "checkpoints" / "latest"
    tiny_model.save_folder(tmp_path, 5).rename(folder)
    (folder / "checkpoint.json").write_text("[" * 100_000)
    assert Scanner(tmp_path, settle=0).scan() == []


@pytest.mark.parametrize("name", [b"step-99999999999999999999.pt", b"latin\xff-step-7.pt"])
def test_a_name_that_the_ledger_could_not_hold_is_not_seen(tmp_path: Path, name: bytes):
    torch.save(tiny_model.weights(1), tmp_path / "step-1.pt")
    (tmp_path / "step-1.pt").rename(tmp_path / os.fsdecode(name))
    assert Scanner(tmp_path, settle=0).scan() == []


@pytest.mark.parametrize("name", ["profiles/step-10.json", "checkpoints/latest/checkpoint.json", "step-3.pt"])
def test_a_pipe_does_not_stop_a_scan(tmp_path: Path, name: str):
    tiny_model.save_folder(tmp_path, 5).rename(tmp_path / "checkpoints" / "latest")
    (tmp_path / "checkpoints" / "latest" / "checkpoint.json").unlink(missing_ok=True)
    (tmp_path / "profiles").mkdir()
    os.mkfifo(tmp_path / name)
    scan = threading.Thread(target=lambda: Scanner(tmp_path, settle=0).scan(), daemon=True)
    scan.start()
    scan.join(timeout=10)
    assert not scan.is_alive()


def test_a_path_that_may_not_be_read_is_not_finished_until_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Root may read everything, so the refusal is played.
    folder = tiny_model.save_folder(tmp_path, 5)
    scanner, real = Scanner(tmp_path, settle=0), Path.is_file

    def refused(path: Path) -> bool:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_file", refused)
        (closed,) = scanner.scan()
    assert (closed.step, closed.complete) == (5, False)
    assert closed.problem == f"{folder.name} cannot be read: Permission denied"
    scanner.scan()
    assert steps(scanner.scan(), complete=True) == [5]


def test_a_long_wait_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rksp_monitor.discovery.TICK_SECONDS", 0.01)
    stop, wake, ticks = threading.Event(), threading.Event(), []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            stop.set()
            wake.set()

    assert len(list(watch(Scanner(tmp_path, settle=0), stop=stop, wake=wake, interval=3600, tick=tick))) == 1
    assert len(ticks) == 3
