"""Replay in worker processes, one a device: what a checkpoint does to torch, memory or time ends there, not here.

`ReplayPool` belongs to the session; each run's thread calls a `Replayer` of its own. A run has one request at a time,
and of those that wait for a device the run whose last turn is longest ago is next. First come first served would not
do: a run that takes longer between two turns (it looks at its folder, writes its ledger) would fall behind, round by
round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rksp_core import errors
from rksp_core.errors import CheckpointError, RkspError
from rksp_core.profile import ModelProfile
from rksp_monitor.config import Workers
from rksp_monitor.subject import SubjectSettings
from rksp_monitor.worker_process import GIB, WorkerEnded, WorkerProcess

CLOSING_SECONDS = 2.0  # that `ReplayPool.close` waits for a thread to notice; then its worker is ended under it
WAIT_SECONDS = 0.25  # between two signs of life of a run whose checkpoint is replayed or waits for its turn
STARTS = 2  # attempts to start a worker: one that is killed while it starts is no reason to suspend a run

Report = Callable[[str, Mapping[str, Any]], None]


class Abandoned(Exception):  # noqa: N818 - an outcome of a replay, no error
    """The replay was given up because the daemon stops."""


@dataclass(frozen=True)
class Replayed:
    """A profile, and how it came about.

    ``seconds`` is the replay itself, without the wait for a turn or a worker. ``notes`` say what was done otherwise
    than asked: smaller micro-batches, or on another device.
    """

    profile: ModelProfile
    seconds: float
    notes: tuple[str, ...] = ()


class ReplayPool:
    """The worker processes of one daemon; they are started when they are first needed.

    Parameters
    ----------
    workers
        Priority, threads and memory of each.
    devices
        What a run's device ``auto`` may mean, as in ``("cuda:0", "cuda:1")``; None finds out.
    stop
        When set, replays that wait or run are given up.
    report
        Called, in a thread of a replay, with ("started", {device, pid, run}), ("built", {device, pid, run, model, kind,
        probe}) or ("ended", {device, pid, run, reason}); ``run`` is the one whose replay brought it about. That the
        workers end when the daemon stops is not reported.
    """

    def __init__(
        self,
        workers: Workers | None = None,
        *,
        devices: Sequence[str] | None = None,
        stop: threading.Event | None = None,
        report: Report = lambda _what, _about: None,
    ) -> None:
        self.workers, self.report = workers or Workers(), report
        self._devices = None if devices is None else tuple(devices)
        self._stop, self._closed = stop or threading.Event(), threading.Event()
        self._places: dict[tuple[str, bool], _Place] = {}
        self._turns: dict[str, Turns] = {}
        self._lock = threading.Lock()

    def replayer(self, run: str, settings: SubjectSettings, *, timeout: float) -> Replayer:
        """Return what the run called ``run`` replays its checkpoints with, each within ``timeout`` seconds."""
        return Replayer(self, run, settings, timeout, self._turns.setdefault(run, Turns()))

    @property
    def shared(self) -> bool:
        """Whether several runs replay their checkpoints here."""
        return len(self._turns) > 1

    @property
    def stopping(self) -> bool:
        """Whether replays are given up."""
        return self._stop.is_set() or self._closed.is_set()

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by device."""
        workers = {key: place.worker for key, place in list(self._places.items()) if not place.aside}
        return {device: worker.pid for (device, _), worker in workers.items() if worker is not None}

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        self._closed.set()
        for place in list(self._places.values()):
            with contextlib.suppress(TimeoutError), place.turn(place.join(Turns()), _until(CLOSING_SECONDS)):
                place.end()
            place.kill()  # it was not handed back in time

    def join(self, device: str, turns: Turns, last: _Place | None, *, aside: bool = False) -> tuple[_Place, _Ticket]:
        """Queue up where a run of that device belongs: the shortest queue, and of equal ones the one it used last.

        ``turns`` are the run's; ``aside`` is a queue of its own with a worker of its own, on the same device.
        """
        with self._lock:
            places = [self._place(name, aside=aside) for name in self._candidates(device)]
            place = min(places, key=lambda one: (one.waiting, one is not last))
            return place, place.join(turns)

    def _place(self, device: str, *, aside: bool) -> _Place:
        return self._places.setdefault((device, aside), _Place(device, aside=aside))

    def _candidates(self, device: str) -> tuple[str, ...]:
        if device == "auto":
            if self._devices is None:
                self._devices = cuda_devices() or ("cpu",)
            return self._devices
        if device == "cuda":
            return ("cuda:0",)
        # A worker says what is wrong with another name: that is no reason to start one for it.
        return (device,) if re.fullmatch(r"cuda:\d+", device) else ("cpu",)


class Replayer:
    """What one run replays its checkpoints with.

    Attributes
    ----------
    restarts
        Workers that ended because of this run's checkpoints, and those that it found dead.
    aside
        Whether the last replay ended its worker: the next one gets a worker of its own, and nobody waits for it.
    """

    def __init__(self, pool: ReplayPool, run: str, settings: SubjectSettings, timeout: float, turns: Turns) -> None:
        self.restarts = 0
        self._pool, self._run, self._settings, self._timeout, self._turns = pool, run, settings, timeout, turns
        self._last: _Place | None = None
        self.aside = False

    def replay(self, path: Path, *, noise: bool = False, tick: Callable[[], None] = lambda: None) -> Replayed:
        """Return the profile of a checkpoint.

        Parameters
        ----------
        path
            The checkpoint; a remote one is named by its URL.
        noise
            Whether to measure the profile's standard errors too.
        tick
            Called at least every 0.25 s meanwhile; what it raises ends the replay and is passed on.

        Raises
        ------
        CheckpointError
            When the checkpoint cannot be used, its worker died, or its time or memory was over.
        ModelError, ProbeError, DeviceError, MemoryLimitError
            When the model cannot be built: no checkpoint can be replayed until somebody repairs that.
        RkspError
            When no worker process could be started.
        Abandoned
            When the daemon stops.
        """
        outcome, given_up = Future[Replayed](), threading.Event()
        arguments = outcome, given_up, path, noise
        # In a thread of its own: a run that hangs in its tick, on a dead mount say, keeps no device from the others.
        threading.Thread(target=self._settle, args=arguments, name=f"replay of {self._run}", daemon=True).start()
        try:
            while not outcome.done():
                tick()
                wait([outcome], WAIT_SECONDS)
        except BaseException:
            given_up.set()
            wait([outcome])
            raise
        return outcome.result()

    def _settle(self, outcome: Future[Replayed], given_up: threading.Event, path: Path, noise: bool) -> None:
        try:
            outcome.set_result(self._replay_in_turn(path, noise, given_up))
        except BaseException as error:  # noqa: BLE001 - raised in the run's thread
            outcome.set_exception(error)

    def _replay_in_turn(self, path: Path, noise: bool, given_up: threading.Event) -> Replayed:
        # What hung or killed its worker is tried again in another one, where nobody has to wait for it.
        place, ticket = self._pool.join(self._settings.device, self._turns, self._last, aside=self.aside)
        self._last = place

        def check() -> None:
            if given_up.is_set() or self._pool.stopping:
                raise Abandoned

        with place.turn(ticket, check):
            try:
                check()
                replayed = self._replay(place, path, noise, check)
            finally:
                if place.aside and place.worker is not None and place.waiting == 1:
                    self._end(place, "nothing else is replayed aside")
            self.aside = False
            return replayed

    def _replay(self, place: _Place, path: Path, noise: bool, tick: Callable[[], None]) -> Replayed:
        settings = self._settings
        known = settings.device in ("auto", "cuda")
        subject = dataclasses.replace(settings, device=place.device) if known else settings
        request = {"path": str(path), "subject": dataclasses.asdict(subject), "noise": noise}
        if place.worker is not None and not place.worker.alive:
            self._end(place, f"it was found dead: {place.worker.how_it_ended()}")
            self.restarts += 1
        answer = self._ask(place, request, path.name, tick)
        if answer.get("stale"):  # its imports are those of another run's code: they cannot be undone in a process
            self._end(place, str(answer["stale"]))
            answer = self._ask(place, request, path.name, tick)
        if "built" in answer:
            self._report(place, "built", **answer["built"])
        limit = self._pool.workers.memory_limit
        if limit is not None and answer["memory"] > limit * GIB:
            self._end(place, f"{path.name} left it with {answer['memory'] / GIB:.1f} GiB, above {limit:g} GiB")
            self.restarts += 1
        if "error" in answer:
            raise _error(answer)
        profile = ModelProfile.from_dict(answer["profile"])
        return Replayed(profile, float(answer["seconds"]), tuple(answer["notes"]))

    def _ask(self, place: _Place, request: Mapping[str, Any], name: str, tick: Callable[[], None]) -> dict[str, Any]:
        """Return the worker's answer; one that gives none is ended."""
        worker = place.worker or self._start(place, tick)
        what = f"the replay of {name}"
        try:
            return worker.ask(request, timeout=self._timeout, tick=tick)
        except WorkerEnded as error:
            self._end(place, f"{what} {error}")
            self.restarts += 1
            self.aside = self._pool.shared
            raise CheckpointError(f"{what} {error}") from error
        except BaseException as error:  # its answer would be taken for that of the next request
            self._end(place, f"{what} was given up ({type(error).__name__})")
            raise

    def _start(self, place: _Place, tick: Callable[[], None]) -> WorkerProcess:
        for attempt in range(1, STARTS + 1):
            worker = WorkerProcess(self._pool.workers)
            place.worker = worker
            try:
                worker.greet(timeout=self._timeout, tick=tick)
            except WorkerEnded as error:
                self._end(place, f"its start {error}")
                if attempt == STARTS:
                    raise RkspError(f"no replay worker could be started for {place.device}: it {error}") from error
            except BaseException:
                self._end(place, "its start was given up")
                raise
            else:
                break
        self._report(place, "started")
        return worker

    def _end(self, place: _Place, reason: str) -> None:
        if not self._pool.stopping:
            self._report(place, "ended", reason=reason)
        place.end()

    def _report(self, place: _Place, what: str, **about: Any) -> None:
        pid = place.worker.pid if place.worker else None
        self._pool.report(what, {"device": place.device, "pid": pid, "run": self._run, **about})


@dataclass
class Turns:
    """When a run was given its last turn, for as long as the process lives; whoever never had one comes first."""

    last: float = -math.inf


@dataclass(eq=False)
class _Ticket:
    """One request of a run."""

    turns: Turns
    called: threading.Event = field(default_factory=threading.Event)


class _Place:
    """One device: its worker process, if it has one, and the requests that wait for it."""

    def __init__(self, device: str, *, aside: bool = False) -> None:
        self.device, self.aside = device, aside
        self.worker: WorkerProcess | None = None
        self._tickets: list[_Ticket] = []  # in the order of arrival
        self._served: _Ticket | None = None
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """The requests that wait, and the one that is served."""
        return len(self._tickets)

    def join(self, turns: Turns) -> _Ticket:
        """Queue up; `turn` must follow."""
        ticket = _Ticket(turns)
        with self._lock:
            self._tickets.append(ticket)
            self._call()
        return ticket

    @contextlib.contextmanager
    def turn(self, ticket: _Ticket, tick: Callable[[], None]) -> Iterator[None]:
        """Wait for one's turn, and have it for the length of the block; what ``tick`` raises ends the wait."""
        try:
            while not ticket.called.wait(WAIT_SECONDS):
                tick()
            yield
        finally:
            with self._lock:
                self._tickets.remove(ticket)
                if self._served is ticket:
                    self._served = None
                self._call()

    def _call(self) -> None:
        """Give a free device to the run whose last turn is longest ago.

        Only its thread wakes up: fifty that look whether it is their turn would be in the way of everybody else.
        """
        if self._served is None and self._tickets:
            self._served = min(self._tickets, key=lambda ticket: ticket.turns.last)
            self._served.turns.last = time.monotonic()
            self._served.called.set()

    def end(self) -> None:
        """End the worker process; only whose turn it is may call this."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.close()

    def kill(self) -> None:
        """Kill the worker process whoever is talking to it."""
        worker = self.worker
        if worker is not None:
            worker.kill()


def cuda_devices() -> tuple[str, ...]:
    """Return the CUDA devices of this machine; torch, which takes seconds to import, is asked only where one may be."""
    nodes = (*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("dxg"))
    if not nodes:
        return ()
    import torch

    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))


def _until(seconds: float) -> Callable[[], None]:
    end = time.monotonic() + seconds

    def tick() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    return tick


def _error(answer: Mapping[str, Any]) -> RkspError:
    kind = getattr(errors, str(answer["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, RkspError)):
        kind = CheckpointError
    return kind(str(answer["message"]))
