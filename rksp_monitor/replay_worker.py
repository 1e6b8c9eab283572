"""The replay worker itself: ``python -m rksp_monitor.replay_worker FD SETTINGS``, started by `worker_process`.

It answers one request after another until the daemon is gone. A checkpoint, a model or a probe that is wrong is an
answer; only what Python cannot catch ends the process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from rksp_core.errors import CheckpointError, MemoryLimitError, ModelError, RkspError
from rksp_monitor.memory import exhausted
from rksp_monitor.remote import as_path
from rksp_monitor.subject import Subject, SubjectSettings

SUBJECTS = 4  # that are kept: a model is built once, not for every checkpoint of every run
NEAR = 0.7  # of the memory limit: from here on only the subject in use is kept
GIB = 2**30


class Stale(Exception):  # noqa: N818 - no error: another process can do it
    """What was built before stands in the way: its modules have the names of others that are needed now."""


class Subjects:
    """The subjects used last, the latest at the end; one that cannot be built is not kept: it may be repaired.

    Parameters
    ----------
    memory_limit
        Bytes of resident memory; None keeps `SUBJECTS` whatever they take.
    """

    def __init__(self, memory_limit: float | None = None) -> None:
        self._kept: OrderedDict[str, Subject] = OrderedDict()
        self._folders: set[Path] = set()
        self._limit = memory_limit

    def take(self, settings: SubjectSettings) -> tuple[Subject, bool]:
        """Return the subject, and whether it was built for this.

        Raises
        ------
        Stale
            When this process has imported another run's code under the same names.
        """
        from rksp_monitor.models import code_folder

        self._enter(code_folder(settings.model))
        key = settings.building
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], False
        while self._kept and (len(self._kept) >= SUBJECTS or self._near_limit()):
            self._kept.popitem(last=False)
            gc.collect()
        subject = self._kept[key] = Subject(settings)
        return subject, True

    def _enter(self, folder: Path) -> None:
        """Let imports find that folder's modules before others, and no other run's."""
        others = self._folders - {folder}
        for name, module in list(sys.modules.items()):
            if "." not in name and _home(module) in others and _holds(folder, name):
                raise Stale(f"the worker imported {name} from {_home(module)}, and now needs that of {folder}")
        self._folders.add(folder)
        hidden = {str(other) for other in others} - {str(Path.cwd())}
        sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in {str(folder), *hidden})]

    def _near_limit(self) -> bool:
        return self._limit is not None and resident_memory() > NEAR * self._limit


def serve(connection: Connection, workers: Mapping[str, Any]) -> None:
    """Answer until the connection closes; ``workers`` are the daemon's settings of that name."""
    import torch

    import rksp_core.profiling  # noqa: F401 - all that takes long to import, scipy too

    # Only now: at a niceness of 10, on two cores that four other processes kept busy, the imports took 48 s, and every
    # checkpoint waits for them; at the usual priority they take 4 s, once.
    _lower_priority(workers["niceness"], idle_io=workers["idle_io"])
    torch.set_num_threads(workers["threads"])
    # An operation that has no deterministic form is used all the same: its rounding is better than no profile.
    # `torch.use_deterministic_algorithms` does the same and imports torch's compiler: 800 modules, 1.2 s.
    torch.set_deterministic_debug_mode("warn")
    limit = workers["memory_limit"]
    subjects = Subjects(None if limit is None else limit * GIB)
    _send(connection, {"pid": os.getpid()})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        start = time.monotonic()
        answer = _answer(subjects, request)
        _send(connection, answer | {"seconds": time.monotonic() - start, "memory": resident_memory()})


def resident_memory() -> int:
    """Return the bytes of memory this process takes."""
    return int(psutil.Process().memory_info().rss)


def _answer(subjects: Subjects, request: Mapping[str, Any]) -> dict[str, Any]:
    settings = SubjectSettings(**request["subject"])
    try:
        subject, new = subjects.take(settings)
    except Stale as reason:
        return {"stale": str(reason)}
    except RkspError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        traceback.print_exc()
        kind = MemoryLimitError if exhausted(error) else ModelError
        return {"error": kind.__name__, "message": f"{settings.model} cannot be built ({_one_line(error)})"}
    built: dict[str, Any] = {"built": subject.describe()} if new else {}
    return built | _replay(subject, as_path(request["path"]), noise=request["noise"])


def _replay(subject: Subject, path: Path, *, noise: bool) -> dict[str, Any]:
    try:
        profile = subject.profile(path, noise=noise)
    except CheckpointError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except RkspError as error:
        return {"error": "CheckpointError", "message": f"{path.name}: {error}"}
    except Exception as error:  # noqa: BLE001 - the worker lives on; the daemon records what happened
        traceback.print_exc()
        return {"error": "CheckpointError", "message": f"{path.name}: the replay raised {_one_line(error)}"}
    return {"profile": profile.to_dict(eigenvalues=False), "notes": list(subject.notes)}


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def _home(module: ModuleType) -> Path | None:
    """Return the folder that a top-level module was found in."""
    spec = getattr(module, "__spec__", None)
    places = [*(getattr(spec, "submodule_search_locations", None) or []), getattr(spec, "origin", None)]
    return Path(places[0]).parent if places[0] else None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _send(connection: Connection, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send_bytes(json.dumps(answer).encode())


def _lower_priority(niceness: int, *, idle_io: bool) -> None:
    """Give way to training on the same machine; where that is not allowed, the replay is done all the same."""
    own = psutil.Process()
    with contextlib.suppress(OSError, psutil.Error):
        own.nice(niceness + own.nice())
    if idle_io and hasattr(own, "ionice"):  # Linux, Windows
        with contextlib.suppress(OSError, psutil.Error):
            own.ionice(psutil.IOPRIO_CLASS_IDLE)


def _end_with_daemon() -> None:
    """End this process when standard input closes, so when the daemon is gone: a replay that hangs must not outlive it.

    No PR_SET_PDEATHSIG: it goes by the thread that started the process, and runs and their threads come and go.
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # a model that asks for input gets none

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a service manager sends them to every process; the daemon decides
    os.dup2(2, 1)  # a model that prints must not write into the daemon's output
    _end_with_daemon()
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[2]))


if __name__ == "__main__":
    _main()
