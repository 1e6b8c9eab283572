"""Run a model and leave it as it was found: modes, gradients, random state, compiled graphs."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and every CUDA device that is in use."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model may use the global state
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled modules as they are written, and torch's encoder layers unfused, so that hooks see plain tensors.

    A graph that was compiled earlier may not call hooks added later, and one traced now would be thrown away with them.
    The fused encoder passes nested tensors, which have no shape, from layer to layer.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    # Without dynamo nothing is compiled, and importing it takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients; restore every module's own mode and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with random_state_kept(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
