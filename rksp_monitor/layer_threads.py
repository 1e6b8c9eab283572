"""Threads that profile the layers of a model side by side.

LAPACK's eigenvalue routine gains nothing from a second thread and, on a busy machine, loses much; two layers at a time
on one thread each do. Six layers of width 768 on two cores that others used too: 30 s one after the other on one
thread, 173 s on two; 17 s in two threads of this kind, 36 s in two processes (each has to import torch).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

MOST = 8  # a layer of width 4096 in work takes 2 to 3 GB


@contextlib.contextmanager
def layer_threads(threads: int | None = None) -> Iterator[Executor | None]:
    """Yield an executor of one-thread workers, or None where there would be only one.

    ``threads`` None means as many as torch would use, so ``OMP_NUM_THREADS`` is obeyed, and at most `MOST`.
    """
    import torch

    before = torch.get_num_threads()
    workers = threads or min(before, MOST)
    if workers < 2:
        yield None
        return
    try:
        with ThreadPoolExecutor(workers, "layer", initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield executor
    finally:
        torch.set_num_threads(before)  # MKL's setting is one for all threads
