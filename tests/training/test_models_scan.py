"""The parallel scan is the recurrence, and so are its derivatives, however far the decays underflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.models.scan import scan


def one_by_one(decay: Tensor, update: Tensor) -> Tensor:
    state, states = torch.zeros_like(update[:, 0]), []
    for a, b in zip(decay.unbind(1), update.unbind(1), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states, dim=1)


def problem(steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(2, steps, 3, 2, generator=generator, dtype=torch.float64) ** 3
    return decay.requires_grad_(), torch.randn_like(decay, requires_grad=True)


@pytest.mark.parametrize("steps", [*range(1, 18), 64, 257])
def test_it_is_the_sequential_recurrence_and_so_are_the_gradients(steps):
    decay, update = problem(steps)
    states, expected = scan(decay, update), one_by_one(decay, update)
    torch.testing.assert_close(states, expected, rtol=1e-10, atol=1e-14)
    weight = torch.randn_like(states)
    torch.testing.assert_close(
        torch.autograd.grad(states, (decay, update), weight),
        torch.autograd.grad(expected, (decay, update), weight),
        rtol=1e-10,
        atol=1e-13,  # sums that cancel
    )


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_first_and_second_derivatives(steps):
    inputs = problem(steps)
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 1.0])
def test_decays_at_the_ends_of_their_range(decay):
    """Products over 1024 steps underflow to 0 or stay 1; nothing is divided, so nothing becomes NaN."""
    update = torch.ones(1, 1024, 1)
    a = torch.full_like(update, decay).requires_grad_()
    states = scan(a, update)
    expected = torch.arange(1.0, 1025).view(1, -1, 1) if decay == 1 else update
    torch.testing.assert_close(states, expected, rtol=1e-6, atol=0)
    states.sum().backward()
    assert a.grad.isfinite().all()


def test_the_inputs_stay_as_they_are():
    decay, update = (part.detach() for part in problem(9))
    kept = decay.clone(), update.clone()
    scan(decay, update)
    assert torch.equal(decay, kept[0])
    assert torch.equal(update, kept[1])


def test_float32_is_as_exact_as_the_loop():
    decay, update = (part.detach() for part in problem(1024))
    exact = one_by_one(decay, update)
    single = decay.float(), update.float()
    error, loop = ((f(*single).double() - exact).abs().max() for f in (scan, one_by_one))
    assert error < 3 * loop
