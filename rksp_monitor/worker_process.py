"""The daemon's end of one replay worker: starts the process, asks it, bounds its time, memory and answers, ends it.

Both ends talk JSON over a socket: nothing that a checkpoint could influence is unpickled in the daemon. The process is
a plain command (``python -m rksp_monitor.replay_worker``) in a process group of its own, so that a Ctrl-C or a signal
to the daemon's group leaves it to the daemon; `multiprocessing` would import the daemon's main module into it and start
a resource tracker that outlives both, and its processes cannot be waited for from several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from typing import Any

import psutil

from rksp_core.errors import RkspError
from rksp_monitor.config import Workers

POLL_SECONDS = 0.1  # between two signs of life, and at most this late to a stop
ANSWER_LIMIT = 256 * 2**20  # bytes; the profile of a layer is some 2 kB
OVERSHOOT = 1.5  # times the memory limit: here a worker is killed in the midst of its work
ENDING_SECONDS = 5.0  # that a process which was killed gets to end
GIB = 2**30


class WorkerEnded(Exception):  # noqa: N818 - an outcome, which the pool turns into an error about a checkpoint
    """The worker gave no answer and must be ended; the text goes on after "the replay of X"."""


class WorkerProcess:
    """One worker process; one thread at a time talks to it.

    Raises
    ------
    RkspError
        When the machine does not start another process.
    """

    def __init__(self, workers: Workers) -> None:
        self._limit = None if workers.memory_limit is None else workers.memory_limit * GIB
        self._connection, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "rksp_monitor.replay_worker", str(theirs.fileno())]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [*command, workers.model_dump_json()],
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however it ends
                pass_fds=(theirs.fileno(),),
                process_group=0,
                env=_environment(workers.threads),
            )
        except OSError as error:
            self._connection.close()
            raise RkspError(f"no replay worker could be started: {error.strerror}") from error
        finally:
            theirs.close()
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def greet(self, *, timeout: float, tick: Callable[[], None]) -> None:
        """Wait until the worker has imported what it needs.

        Raises
        ------
        WorkerEnded
            When it ended, or took longer than ``timeout`` seconds.
        """
        self._receive(timeout, tick)

    def ask(self, request: Mapping[str, Any], *, timeout: float, tick: Callable[[], None]) -> dict[str, Any]:
        """Send a request and return the answer; ``tick`` is called meanwhile, and what it raises is passed on.

        Raises
        ------
        WorkerEnded
            When there will be no answer: it died, took too long or too much memory, or answered nonsense.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(json.dumps(request).encode())
        return self._receive(timeout, tick)

    def how_it_ended(self) -> str:
        """Return how, in words, once it has ended."""
        code = self._process.poll()
        if code is None:
            return "it runs"
        return f"by signal {-code}" if code < 0 else f"with exit code {code}"

    def kill(self) -> None:
        """Kill the process; the thread that talks to it finds it dead."""
        self._process.kill()

    def close(self) -> None:
        """End the process, whatever it is doing; one that hangs in the kernel, on a dead mount, is left behind."""
        self._connection.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_SECONDS)
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.close()

    def _receive(self, timeout: float, tick: Callable[[], None]) -> dict[str, Any]:
        end = time.monotonic() + timeout
        try:
            while not self._connection.poll(POLL_SECONDS):
                tick()
                self._bound_memory()
                # A tick may have taken long; an answer that came meanwhile is in time.
                if time.monotonic() > end and not self._connection.poll():
                    raise WorkerEnded(f"took longer than {timeout:g} s; raise replay.timeout")
            answer = json.loads(self._connection.recv_bytes(ANSWER_LIMIT))
        except (EOFError, ConnectionResetError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
            how = self.how_it_ended()
            raise WorkerEnded(f"ended its worker {how}; out of memory, or a crash in native code") from error
        except (OSError, ValueError, RecursionError) as error:  # larger than the limit, or no JSON
            raise WorkerEnded(f"gave no answer that can be read ({type(error).__name__}: {error})") from error
        if not isinstance(answer, dict):
            raise WorkerEnded(f"gave a {type(answer).__name__} for an answer, expected a document")
        return answer

    def _bound_memory(self) -> None:
        """Raise when the worker has outgrown its memory limit in the midst of its work."""
        if self._limit is None:
            return
        with contextlib.suppress(psutil.Error):  # it has just ended: the connection says so
            resident = psutil.Process(self.pid).memory_info().rss
            if resident > OVERSHOOT * self._limit:
                raise WorkerEnded(
                    f"took {resident / GIB:.1f} GiB of memory, {OVERSHOOT:g} times workers.memory_limit; raise it, or "
                    "lower replay.micro_batch or replay.samples"
                )


def _environment(threads: int) -> dict[str, str]:
    """Return the worker's environment: it finds the modules that this process finds, with a fixed number of threads."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # noqa: PTH109 - "" means this folder
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    # cuBLAS sums in a fixed order only with a fixed workspace (torch.use_deterministic_algorithms).
    return {**os.environ, **counts, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
