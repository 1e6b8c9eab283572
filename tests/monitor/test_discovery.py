"""Discovery on a real folder: half-written files, atomic renames, and waking up with and without file events."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rksp_core import ProfileWriter
from rksp_monitor import discovery, sighting
from rksp_monitor.checkpoints import FORMATS
from rksp_monitor.discovery import FileEvents, Scanner, Sighting, watch
from tests.core.profiles import profile
from tests.monitor import tiny_model


def steps(sightings: list[Sighting], **wanted: bool) -> list[int]:
    return [s.step for s in sightings if all(getattr(s, name) == value for name, value in wanted.items())]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path):
    assert Scanner(tmp_path / "later").scan() == []


def test_whether_there_is_anything_is_known_from_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks: list[str] = []

    def look(path: Path, *about: object) -> Sighting | None:
        looks.append(path.name)
        return sighting.look(path, *about)

    monkeypatch.setattr(discovery, "look", look)
    scanner = Scanner(tmp_path)
    assert not scanner.finds_any()
    (tmp_path / "notes-1.txt").write_text("no checkpoint")
    assert not scanner.finds_any()
    for step in range(20):
        ProfileWriter(tmp_path, every=1).write(profile(), step)
    looks.clear()
    assert scanner.finds_any()
    assert len(looks) <= 2
    assert len(scanner.scan()) == 20


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


def text_of_a_profile() -> str:
    return json.dumps(profile(step=1).to_dict())


def fill(folder: Path, steps: range) -> None:
    folder.mkdir(exist_ok=True)
    for step in steps:
        (folder / f"step-{step:08d}.json").write_text(text_of_a_profile())


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked at, rather than listed."""
    names: list[str] = []
    real = discovery.look

    def counted(path: Path, *rest: object) -> Sighting | None:
        names.append(path.name)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(discovery, "look", counted)
    return names


def test_finished_ones_are_looked_at_in_turns(tmp_path: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "TURN", 4)
    fill(tmp_path / "profiles", range(10))
    scanner = Scanner(tmp_path)
    assert len(scanner.scan()) == 10
    counts = []
    for _ in range(5):
        looked.clear()
        scanner.scan()
        counts.append(len(looked))
    assert counts == [4] * 5


def test_what_is_renamed_into_place_is_found_without_a_look_at_the_others(
    tmp_path: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(discovery, "TURN", 0)
    fill(tmp_path / "profiles", range(10))
    scanner = Scanner(tmp_path)
    before = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    looked.clear()
    (tmp_path / "profiles" / ".new").write_text(text_of_a_profile())
    (tmp_path / "profiles" / ".new").rename(tmp_path / "profiles" / "step-00000007.json")
    after = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    assert looked == ["step-00000007.json"]
    assert {step for step in after if after[step] != before[step]} == {7}


def test_what_is_written_again_in_place_is_found_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "TURN", 3)
    fill(tmp_path / "profiles", range(10))
    scanner = Scanner(tmp_path)
    before = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    with (tmp_path / "profiles" / "step-00000007.json").open("r+") as stream:
        stream.write(text_of_a_profile())
    for _ in range(5):
        after = {sighting.step: sighting.fingerprint for sighting in scanner.scan()}
    assert {step for step in after if after[step] != before[step]} == {7}


def test_the_same_list_is_returned_until_something_changes(tmp_path: Path):
    fill(tmp_path / "profiles", range(3))
    scanner = Scanner(tmp_path)
    first = scanner.scan()
    assert scanner.scan() is first
    (tmp_path / "profiles" / "step-00000001.json").unlink()
    assert steps(scanner.scan()) == [0, 2]


def test_what_the_ledger_knows_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "profiles", range(3))
    tiny_model.save_folder(tmp_path, 5)
    scanner = Scanner(tmp_path, settle=0)
    scanner.scan()
    known = scanner.scan()
    fill(tmp_path / "profiles", range(2, 4))  # one is another now, and one is new
    checks: list[Path] = []
    for name in ("profile", "folder"):
        real = FORMATS[name].is_complete
        monkeypatch.setattr(FORMATS[name], "is_complete", lambda path, real=real: (checks.append(path), real(path))[1])
    found = Scanner(tmp_path, known=known).scan()
    assert steps(found, complete=True) == [0, 1, 2, 3, 5]
    assert sorted(path.name for path in checks) == ["step-00000002.json", "step-00000003.json"]


@pytest.mark.parametrize(
    "place",
    [
        "step-7.pt",
        "checkpoints/step-7.pt",
        "checkpoint/step-7.pt",
        "weights/epoch=0-step=7.ckpt",
        "ckpts/model-7.pt",
        "lightning_logs/version_0/checkpoints/epoch=0-step=7.ckpt",
        "lightning_logs/version_12/checkpoints/epoch=0-step=7.ckpt",
    ],
)
def test_checkpoints_are_found_where_trainers_put_them(tmp_path: Path, place: str):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tiny_model.weights(7), tmp_path / place)
    assert steps(Scanner(tmp_path).scan()) == [7]


def test_a_file_settles_for_some_time_however_often_it_is_looked_at(tmp_path: Path):
    (tmp_path / "step-1.safetensors").write_bytes(save(tiny_model.weights(1)))
    scanner = Scanner(tmp_path, settle=3600)
    for _ in range(3):
        (found,) = scanner.scan()
        assert found.settling


def test_a_folder_that_our_trainer_renames_into_place_needs_no_settling(tmp_path: Path):
    folder = tiny_model.save_folder(tmp_path, 5)
    os.utime(folder / "model.safetensors", ns=(0, (folder / "checkpoint.json").stat().st_mtime_ns - 1))
    assert steps(Scanner(tmp_path, settle=3600).scan(), complete=True) == [5]


@pytest.mark.parametrize("reason", ["marker first", "same time", "another trainer", "no marker", "marker is damaged"])
def test_a_folder_settles_unless_a_marker_proves_that_it_is_done(tmp_path: Path, reason: str):
    folder = tiny_model.save_folder(tmp_path, 5)
    marker = folder / "checkpoint.json"
    if reason == "another trainer":
        marker.write_text('{"step": 5}')
    elif reason == "marker is damaged":
        marker.write_text('["rksp.checkpoint/1"')
    elif reason == "no marker":
        marker.unlink()
    else:
        earlier = marker.stat().st_mtime_ns if reason == "same time" else 0
        os.utime(marker, ns=(earlier, earlier))
    if reason in ("another trainer", "marker is damaged"):
        os.utime(folder / "model.safetensors", ns=(0, 0))
    elif reason == "same time":
        os.utime(folder / "model.safetensors", ns=(earlier, earlier))
    assert steps(Scanner(tmp_path, settle=3600).scan(), settling=True) == [5]


@pytest.mark.parametrize("place", ["step-3.pt", "checkpoints/step-3", "checkpoints/step-3/model.safetensors"])
def test_a_link_out_of_the_run_folder_is_refused(tmp_path: Path, place: str):
    run, secret = tmp_path / "run", tmp_path / "secret"
    weights = tiny_model.save_folder(secret, 3) / "model.safetensors"
    torch.save(tiny_model.weights(3), secret / "step-3.pt")
    target = {"step-3.pt": secret / "step-3.pt", "step-3": weights.parent}.get(Path(place).name, weights)
    (run / place).parent.mkdir(parents=True)
    (run / place).symlink_to(target)
    (found,) = Scanner(run).scan()
    assert (found.step, found.complete, found.refused) == (3, False, True)
    assert "out of the run folder" in found.problem


def test_links_within_the_run_are_followed_and_aliases_are_seen_once(tmp_path: Path):
    run = tmp_path / "run"
    (run / "raw").mkdir(parents=True)
    torch.save(tiny_model.weights(3), run / "raw" / "blob.pt")
    (run / "step-3.pt").symlink_to("raw/blob.pt")
    tiny_model.save_folder(run, 5)
    (run / "checkpoints" / "latest").symlink_to("step-00000005")
    assert steps(Scanner(run).scan()) == [3, 5]


def test_the_folder_of_checkpoints_may_be_a_link_to_another_disk(tmp_path: Path):
    tiny_model.save_folder(tmp_path / "disk", 5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    assert steps(Scanner(tmp_path / "run", settle=0).scan(), refused=False) == [5]


def test_a_name_with_a_line_break_is_one_line_in_sentences(tmp_path: Path):
    (tmp_path / "forged\nstep-1.safetensors").write_bytes(save(tiny_model.weights(1))[:100])
    (found,) = Scanner(tmp_path).scan()
    assert found.step == 1
    assert "\n" not in found.problem


def test_a_name_that_is_no_utf8_is_said(tmp_path: Path):
    torch.save(tiny_model.weights(1), tmp_path / "step-1.pt")
    (tmp_path / "step-1.pt").rename(tmp_path / os.fsdecode(b"latin\xff-step-7.pt"))
    scanner = Scanner(tmp_path)
    assert scanner.scan() == []
    (sentence,) = scanner.unreadable
    assert sentence == rf"latin\udcff-step-7.pt in {tmp_path} is no UTF-8; rename it, or it is not seen"


def test_a_folder_without_permission_is_said_and_keeps_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Root may read everything, so the refusal is played.
    tiny_model.save_folder(tmp_path, 5)
    fill(tmp_path / "profiles", range(3))
    scanner, real = Scanner(tmp_path, settle=0), discovery.names_in
    assert steps(scanner.scan()) == [0, 1, 2, 5]

    def refused(folder: Path) -> dict[str, str]:
        if folder.name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(discovery, "names_in", refused)
        assert steps(scanner.scan()) == [0, 1, 2, 5]
        assert scanner.unreadable == [
            f"{tmp_path / 'checkpoints'} may not be listed (Permission denied); its checkpoints are not seen"
        ]
    scanner.scan()
    assert scanner.unreadable == []


def test_a_stale_handle_fails_the_scan_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model.save_folder(tmp_path, 5)
    fill(tmp_path / "profiles", range(3))
    scanner, real = Scanner(tmp_path, settle=0), discovery.names_in

    def stale(folder: Path) -> dict[str, str]:
        if folder.name == "profiles":
            raise OSError(116, "Stale file handle", str(folder))
        return real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(discovery, "names_in", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            scanner.scan()
    assert steps(scanner.scan()) == [0, 1, 2, 5]


def test_what_vanishes_between_the_listing_and_the_look_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "names_in", lambda _: {"step-1.pt": "1", "step-2": "2"})
    assert Scanner(tmp_path).scan() == []


def test_a_long_scan_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "TICK_SECONDS", 0.0)
    fill(tmp_path / "profiles", range(5))
    ticks: list[int] = []
    Scanner(tmp_path).scan(lambda: ticks.append(1))
    assert len(ticks) >= 5


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


def test_a_file_event_within_a_folder_of_a_step_ends_a_long_wait(tmp_path: Path):
    folder = tmp_path / "checkpoints" / "step-5"

    def write() -> None:  # in place, and slowly: long after the event that the folder itself was
        folder.mkdir(parents=True)
        time.sleep(0.5)
        (folder / "model.safetensors").write_bytes(save(tiny_model.weights(5)))

    with FileEvents() as events:
        assert first_complete(tmp_path, write, events=events, interval=3600) == [5]


def test_inodes_mean_nothing_on_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "profiles", range(1))
    (first,) = Scanner(tmp_path).scan()
    monkeypatch.setattr(discovery, "filesystem_of", lambda _: "fuse.sshfs")
    (second,) = Scanner(tmp_path).scan()
    path = second.path
    times = path.stat()
    content = path.read_bytes()
    path.rename(tmp_path / "other")
    path.write_bytes(content)  # what a new mount looks like: the same file, under another number
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_ino != times.st_ino
    (third,) = Scanner(tmp_path).scan()
    assert first.fingerprint != second.fingerprint == third.fingerprint


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
