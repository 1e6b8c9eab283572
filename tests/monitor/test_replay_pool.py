"""Several runs and one pool: turns, devices, and code of the same name."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.errors import CheckpointError
from rksp_monitor.config import Workers
from rksp_monitor.replay import Abandoned, ReplayPool, Turns
from rksp_monitor.subject import SubjectSettings
from tests.monitor import tiny_model
from tests.waiting import until

QUICK = Workers(niceness=1)  # other tests on the same machine need not come first
SMALL = {"samples": 256, "sequences": 8, "length": 32, "device": "cpu"}


def _nothing() -> None:
    pass


class Asking:
    """Runs that ask for a turn, each in a thread of its own, while one of them holds the device."""

    def __init__(self, pool: ReplayPool) -> None:
        self._pool, self._turns, self.order = pool, dict[str, Turns](), list[str]()

    def ask(self, *runs: str) -> None:
        """Let them all wait, one after the other, before the first of them can have its turn."""
        place, first = self._pool.join("cpu", Turns(), None)
        with ThreadPoolExecutor(len(runs)) as threads, place.turn(first, _nothing):
            for number, run in enumerate(runs, start=2):
                threads.submit(self._take, run)
                until(lambda number=number: place.waiting == number)

    def _take(self, run: str) -> None:
        place, ticket = self._pool.join("cpu", self._turns.setdefault(run, Turns()), None)
        with place.turn(ticket, _nothing):
            self.order.append(run)


def test_whoever_never_had_a_turn_comes_first_and_equals_in_the_order_of_their_requests():
    runs = Asking(ReplayPool())
    runs.ask("a", "b", "c")
    runs.ask("a", "b", "c", "d", "e")
    assert runs.order == [*"abc", *"de", *"abc"]


@given(st.lists(st.permutations("abcd"), min_size=1, max_size=3))
@settings(max_examples=5, deadline=None)
def test_nobody_has_a_second_turn_while_another_waits_for_the_first(rounds: list[list[str]]):
    """Whatever the order in which they come back: who takes longer between two turns falls behind by none."""
    runs = Asking(ReplayPool())
    for number, each in enumerate(rounds, start=1):
        runs.ask(*each)
        assert runs.order == list(rounds[0]) * number


def test_one_who_gives_up_waiting_holds_up_nobody():
    pool = ReplayPool()
    (place, first), (_, second), (_, third) = (pool.join("cpu", Turns(), None) for _ in range(3))

    def give_up() -> None:
        raise Abandoned

    with place.turn(first, _nothing), pytest.raises(Abandoned), place.turn(second, give_up):
        raise AssertionError("it is not its turn")
    with place.turn(third, _nothing):
        assert place.waiting == 1


def test_runs_of_auto_are_spread_over_the_devices_and_stay_where_their_model_is():
    pool = ReplayPool(devices=("cuda:0", "cuda:1"))
    tickets = [pool.join("auto", Turns(), None) for _ in range(4)]
    assert [place.device for place, _ in tickets] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    for place, ticket in tickets:
        with place.turn(ticket, _nothing):
            pass
    for place, _ in tickets:
        same, ticket = pool.join("auto", Turns(), place)
        assert same is place
        with place.turn(ticket, _nothing):
            pass
    assert pool.join("cuda", Turns(), None)[0].device == "cuda:0"
    assert pool.join("cpu", Turns(), None)[0].device == "cpu"


def test_a_trainers_code_is_not_mistaken_for_that_of_another_run(tmp_path: Path):
    """Both runs keep their model in a file of the same name, beside their configuration."""
    widths = {"a": 16, "b": 8}
    for name, width in widths.items():
        run = tmp_path / name
        run.mkdir()
        code = f"from tests.monitor.tiny_model import build\n\ndef make():\n    return build(width={width})\n"
        (run / "own_model.py").write_text(code)
        (run / "config.yaml").write_text("model: {factory: 'own_model:make'}")
        tiny_model.save_folder(run, 100, width=width)
    reasons = []

    def report(what: str, about: object) -> None:
        if what == "ended":
            reasons.append(about["reason"])

    with contextlib.closing(ReplayPool(QUICK, report=report)) as pool:
        for name, width in widths.items():
            settings = SubjectSettings(str(tmp_path / name / "config.yaml"), **SMALL)
            replayer = pool.replayer(name, settings, timeout=60)
            replayed = replayer.replay(tmp_path / name / "checkpoints" / "step-00000100")
            assert {layer.width for layer in replayed.profile.layers} == {width}
            assert replayer.restarts == 0
    assert reasons == [f"the worker imported own_model from {tmp_path / 'a'}, and now needs that of {tmp_path / 'b'}"]


def test_runs_share_a_worker_each_gets_its_own_profile_and_a_stop_ends_the_waits(tmp_path: Path):
    tiny_model.save_folder(tmp_path, 100)
    tiny_model.save_folder(tmp_path, 200)
    tiny_model.save_folder(tmp_path, 400, code=7.0)
    settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", **SMALL)
    stop = threading.Event()

    def replay(step: int) -> int | None:
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        return pool.replayer(f"run {step}", settings, timeout=60).replay(path).profile.step

    with contextlib.closing(ReplayPool(QUICK, stop=stop)) as pool, ThreadPoolExecutor(4) as threads:
        assert list(threads.map(replay, (100, 200, 100, 200))) == [100, 200, 100, 200]
        assert len(pool.pids) == 1
        hanging = [threads.submit(replay, 400) for _ in range(3)]
        time.sleep(0.2)
        stop.set()
        for future in hanging:
            with pytest.raises(Abandoned):
                future.result()


def test_a_thread_that_hangs_in_its_tick_does_not_keep_its_worker_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rksp_monitor.replay.CLOSING_SECONDS", 0.2)
    tiny_model.save_folder(tmp_path, 400, code=7.0)
    settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", **SMALL)
    release, hangs = threading.Event(), threading.Event()
    pool = ReplayPool()

    def tick() -> None:
        if pool.pids:
            hangs.set()
            release.wait()

    with ThreadPoolExecutor(1) as threads:
        path = tmp_path / "checkpoints" / "step-00000400"
        hanging = threads.submit(pool.replayer("run", settings, timeout=60).replay, path, tick=tick)
        hangs.wait()
        try:
            worker = pool.pids["cpu"]
            pool.close()
            until(lambda: not psutil.pid_exists(worker))
        finally:
            release.set()
        with pytest.raises(Abandoned):
            hanging.result()
    assert pool.pids == {}


def test_a_run_whose_checkpoint_hung_is_tried_aside_and_holds_up_nobody(tmp_path: Path):
    settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", **SMALL)
    hanging, good = tmp_path / "a", tmp_path / "b"
    tiny_model.save_folder(hanging, 100, code=7.0)
    tiny_model.save_folder(good, 100)
    stop = threading.Event()
    with contextlib.closing(ReplayPool(QUICK, stop=stop)) as pool, ThreadPoolExecutor(1) as threads:
        others = pool.replayer("b", settings, timeout=120)
        others.replay(good / "checkpoints" / "step-00000100")  # its worker is the one that the other run hangs next
        with pytest.raises(CheckpointError, match="longer than 1 s"):
            pool.replayer("a", settings, timeout=1).replay(hanging / "checkpoints" / "step-00000100")
        trouble = pool.replayer("a", settings, timeout=120)
        trouble.aside = True
        again = threads.submit(trouble.replay, hanging / "checkpoints" / "step-00000100")
        others.replay(good / "checkpoints" / "step-00000100")
        assert not again.done(), "the good run had to wait for the hanging one"
        stop.set()
        with pytest.raises(Abandoned):
            again.result()


def test_a_run_that_hangs_beside_its_replay_keeps_the_device_from_nobody(tmp_path: Path):
    """Its own scan hangs on a dead mount, say: the replay ends, others have their turns, and the answer waits."""
    settings = SubjectSettings("tests.monitor.tiny_model:build_scripted", **SMALL)
    tiny_model.save_folder(tmp_path, 100)
    path = tmp_path / "checkpoints" / "step-00000100"
    release, hangs, told = threading.Event(), threading.Event(), list[str]()

    def hang() -> None:
        hangs.set()
        release.wait()

    with (
        contextlib.closing(ReplayPool(QUICK, report=lambda what, _: told.append(what))) as pool,
        ThreadPoolExecutor(1) as threads,
    ):
        hanging = threads.submit(pool.replayer("a", settings, timeout=120).replay, path, tick=hang)
        hangs.wait()
        others = pool.replayer("b", settings, timeout=120)
        assert [others.replay(path).profile.step for _ in range(2)] == [100, 100]
        assert not hanging.done()
        release.set()
        assert hanging.result().profile.step == 100
        assert len(pool.pids) == 1
    assert told == ["started", "built"], "one worker did it all"
