"""Replay in a separate process: what a checkpoint does to torch, memory or time ends there, not in the daemon.

The worker is spawned when it is first needed and used again; after a crash or a time limit the next replay starts
another. Both ends talk JSON: nothing that a checkpoint could influence is unpickled in the daemon.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rksp_core import errors
from rksp_core.errors import CheckpointError, RkspError
from rksp_core.profile import ModelProfile
from rksp_monitor.daemon import Abandoned
from rksp_monitor.subject import Subject, SubjectSettings

POLL_SECONDS = 0.25  # between two signs of life, and at most this late to a stop


class ReplayWorker:
    """The daemon's end.

    Parameters
    ----------
    settings
        What checkpoints are replayed with.
    timeout
        Seconds that a start, or a replay, may take.
    niceness, threads
        Of the worker: training on the same machine comes first.
    stop
        When set, a replay that runs is given up.
    started
        Called with the worker's process, model and probe each time one is ready.
    """

    def __init__(
        self,
        settings: SubjectSettings,
        *,
        timeout: float,
        niceness: int = 10,
        threads: int = 1,
        stop: threading.Event | None = None,
        started: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.restarts = 0
        self.process: BaseProcess | None = None
        self._announce = started
        self._settings, self._timeout = settings, timeout
        self._niceness, self._threads = niceness, threads
        self._stop = stop or threading.Event()
        self._connection: Connection | None = None
        self._started = 0

    def replay(self, path: Path, *, tick: Callable[[], None] = lambda: None) -> ModelProfile:
        """Return the profile of a checkpoint.

        Raises
        ------
        CheckpointError
            When the checkpoint cannot be used, the worker died, or the time is over.
        ModelError, ProbeError, DeviceError
            When the worker cannot even start: no checkpoint can be replayed.
        Abandoned
            When ``stop`` was set.
        """
        if self.process is None:
            self._start(tick)
        assert self._connection is not None  # noqa: S101 - `_start` made it
        with contextlib.suppress(BrokenPipeError):
            self._connection.send_bytes(str(path).encode())
        answer = self._receive(f"the replay of {path.name}", tick)
        if "profile" in answer:
            return ModelProfile.from_dict(answer["profile"])
        raise _error(answer)

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
        self.process = self._connection = None

    def _start(self, tick: Callable[[], None]) -> None:
        self.restarts += self._started > 0
        self._started += 1
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, dataclasses.asdict(self._settings), os.getpid(), self._niceness, self._threads)
        self.process = context.Process(target=_serve, args=arguments, name="rksp-replay", daemon=True)
        self.process.start()
        theirs.close()
        answer = self._receive("the start of the replay worker", tick)
        if "error" in answer:
            self.close()
            raise _error(answer)
        self._announce(answer)

    def _receive(self, what: str, tick: Callable[[], None]) -> dict[str, Any]:
        """Wait for an answer; end the worker when there will be none."""
        assert self._connection is not None  # noqa: S101
        assert self.process is not None  # noqa: S101
        end = time.monotonic() + self._timeout
        try:
            while not self._connection.poll(POLL_SECONDS):
                tick()
                if self._stop.is_set():
                    self.close()
                    raise Abandoned
                if time.monotonic() > end:
                    self.close()
                    raise CheckpointError(f"{what} took longer than {self._timeout:g} s; raise replay.timeout")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            self.process.join(timeout=5)
            code = self.process.exitcode
            self.close()
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            raise CheckpointError(f"{what} ended its worker {how}; out of memory, or a crash in native code") from error
        return answer


def _error(answer: Mapping[str, Any]) -> RkspError:
    kind = getattr(errors, answer["error"], CheckpointError)
    return kind(answer["message"])


def _serve(connection: Connection, settings: Mapping[str, Any], parent: int, niceness: int, threads: int) -> None:
    """Be the worker: build the subject once, then profile one path after another until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach the whole process group; the daemon decides
    os.dup2(sys.stderr.fileno(), 1)  # a model that prints must not write into the daemon's output
    os.nice(niceness)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        import torch

        torch.set_num_threads(threads)
        subject = Subject(SubjectSettings(**settings))
    except RkspError as error:
        _send(connection, {"error": type(error).__name__, "message": str(error)})
        return
    described = {
        "pid": os.getpid(),
        "probe": subject.probe.to_dict(),
        "model": subject.model.source,
        "kind": subject.model.kind,
    }
    _send(connection, described)
    while True:
        try:
            path = Path(connection.recv_bytes().decode())
        except EOFError:
            return
        _send(connection, _answer(subject, path))


def _answer(subject: Subject, path: Path) -> dict[str, Any]:
    try:
        return {"profile": subject.profile(path).to_dict(eigenvalues=False)}
    except CheckpointError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except RkspError as error:
        return {"error": "CheckpointError", "message": f"{path.name}: {error}"}
    except Exception as error:  # noqa: BLE001 - the worker lives on; the daemon records what happened
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        return {"error": "CheckpointError", "message": f"{path.name}: the replay raised {type(error).__name__}: {text}"}


def _send(connection: Connection, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.send_bytes(json.dumps(answer).encode())


def _end_with(parent: int) -> None:
    """End this process when the daemon is gone: a replay that hangs must not outlive it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
