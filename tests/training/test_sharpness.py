"""Sharpness: Lanczos against dense eigenvalues, and a whole preconditioned Hessian built entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian
from torch.func import functional_call

from training.experiments.sharpness import extremes, sharpness
from training.ranks import Ranks
from training.run import Run, build_run
from training.step import advance
from training.tasks import TRAINING

ALONE = Ranks(0, 1, torch.device("cpu"))


def symmetric(size: int, seed: int) -> Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + matrix.T


def start(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 40])
def test_as_many_steps_as_dimensions_find_both_ends(size: int) -> None:
    matrix = symmetric(size, seed=size)
    values = torch.linalg.eigvalsh(matrix)
    assert extremes(lambda v: matrix @ v, start(size), size) == pytest.approx(
        (float(values[0]), float(values[-1])), rel=1e-10
    )


def test_an_operator_with_few_eigenvalues_ends_early() -> None:
    """diag(-3, 5, 5, ..): the Krylov space has two dimensions, and a third product would be of rounding errors."""
    diagonal = torch.full((30,), 5.0, dtype=torch.float64)
    diagonal[0] = -3.0
    calls = []

    def operator(vector: Tensor) -> Tensor:
        calls.append(vector)
        return diagonal * vector

    assert extremes(operator, start(30), 20) == pytest.approx((-3.0, 5.0), rel=1e-10)
    assert len(calls) == 2


def test_zero_has_no_curvature_and_nan_is_said() -> None:
    assert extremes(torch.zeros_like, start(5), 4) == (0.0, 0.0)
    low, high = extremes(lambda v: v * torch.nan, start(5), 4)
    assert low != low
    assert high != high


@given(size=st.integers(2, 30), seed=st.integers(0, 999), iterations=st.integers(1, 12))
def test_it_is_never_beyond_the_ends_and_comes_closer_with_every_step(size: int, seed: int, iterations: int) -> None:
    matrix = symmetric(size, seed)
    values = torch.linalg.eigvalsh(matrix)
    rounding = 1e-10 * float(values.abs().max())
    low, high = extremes(lambda v: matrix @ v, start(size), iterations)
    nearer_low, nearer_high = extremes(lambda v: matrix @ v, start(size), iterations + 1)
    assert float(values[0]) - rounding <= nearer_low <= low + rounding
    assert high - rounding <= nearer_high <= float(values[-1]) + rounding


def whole_hessian(run: Run, sequences: int) -> Tensor:
    """The Hessian of the loss with all its entries, row by row."""
    named = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    shapes, sizes = [each.shape for each in named.values()], [each.numel() for each in named.values()]
    inputs, targets = run.task.batch(TRAINING, run.step, run.config.task.batch)

    def loss(flat: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
        logits = functional_call(run.model, dict(zip(named, parts, strict=True)), (inputs[:sequences],))
        return run.task.loss(logits, targets[:sequences])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return hessian(loss, torch.cat([each.flatten() for each in named.values()]))


TINY: dict[str, Any] = {
    "model": {
        "factory": "training.models.gpt:GPT",
        "arguments": {"vocabulary": 8, "length": 5, "width": 4, "depth": 1, "heads": 2, "norm": "pre_ln"},
    },
    "precision": "float64",
    "task": {"batch": 6, "pairs": 2},
    "schedule": {"warmup": 0},
}


@pytest.mark.parametrize("optimizer", [{"name": "adamw", "betas": [0.8, 0.9]}, {"name": "sgd"}])
def test_sharpness_is_that_of_the_preconditioned_hessian(configure: Any, optimizer: dict[str, Any]) -> None:
    run = build_run(configure(**TINY, optimizer={**optimizer, "learning_rate": 0.01}), ALONE)
    squares = [torch.zeros_like(parameter) for parameter in run.model.parameters()]
    for _ in range(3):
        advance(run)
        for square, parameter in zip(squares, run.model.parameters(), strict=True):
            square.mul_(0.9).add_(0.1 * parameter.grad.square())  # Adam's second moments, by hand
    found = whole_hessian(run, sequences=4)
    scale = torch.ones(len(found), dtype=torch.float64)
    if optimizer["name"] == "adamw":
        v_hat = torch.cat([square.flatten() for square in squares]) / (1 - 0.9**3)
        scale = (v_hat.sqrt() + 1e-8) ** -0.5
    values = torch.linalg.eigvalsh(scale[:, None] * found * scale)
    high, low = sharpness(run, 0.01, sequences=4, iterations=len(found))
    # Entries of D span 1e4 where a token was never seen, and with them the rounding of the dense matrix.
    assert high == pytest.approx(0.01 * float(values[-1]), rel=1e-6)
    assert low == pytest.approx(0.01 * float(values[0]), rel=1e-6)


def test_an_optimizer_without_second_moments_has_none(configure: Any) -> None:
    lion = build_run(configure(optimizer={"name": "lion"}), ALONE)
    advance(lion)
    assert sharpness(lion, 0.01, sequences=4, iterations=3) is None
    assert sharpness(build_run(configure(), ALONE), 0.01, sequences=4, iterations=3) is None  # before the first step
