"""How many threads of runs work at once, whoever hangs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rksp_monitor.desk import Desk
from tests.waiting import until

FOREVER = 3600.0


def test_no_more_threads_work_at_once_than_there_are_seats():
    desk, lock = Desk(2, FOREVER), threading.Lock()
    now, most = 0, 0

    def work(_: int) -> None:
        nonlocal now, most
        with desk:
            with lock:
                now += 1
                most = max(most, now)
            threading.Event().wait(0.001)
            with lock:
                now -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(50)))
    assert most == 2


def test_whoever_came_first_sits_first():
    desk, order = Desk(1, FOREVER), list[int]()

    def work(number: int) -> None:
        with desk:
            order.append(number)

    with ThreadPoolExecutor(5) as threads, desk:
        for number in range(5):
            threads.submit(work, number)
            until(lambda number=number: len(desk._queue) == number + 1)
    assert order == [*range(5)]


def test_one_that_hangs_keeps_its_seat_no_longer_than_its_lease():
    desk, sits, release = Desk(1, 0.01), threading.Event(), threading.Event()

    def hang() -> None:
        with desk:
            sits.set()
            release.wait()

    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(hang)
        sits.wait()
        with desk:
            assert not hanging.done()
        release.set()
        hanging.result()
    with desk:  # and its seat is there again
        pass


def test_long_work_that_rests_lets_those_who_wait_go_first_and_goes_on_after_them():
    desk, order = Desk(1, FOREVER), list[str]()

    def work() -> None:
        with desk:
            desk.rest()  # not before its lease is over
            order.append("long")
            until(lambda: desk._queue)
            desk.rest()
            order.append("still")
            desk._own.guest.until = 0.0
            desk.rest()
            assert len(desk._seated) == 1
            order.append("longer")

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        until(lambda: order)
        with desk:
            order.append("short")
        working.result()
    assert order == ["long", "still", "short", "longer"]


def test_a_thread_that_has_a_seat_takes_no_second_and_an_error_leaves_it():
    desk = Desk(1, FOREVER)
    with pytest.raises(OSError, match="no"), desk, desk:
        raise OSError("no")
    with desk:
        pass
