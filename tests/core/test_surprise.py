"""Surprise clipping: a gradient of the usual size passes untouched; a larger one is scaled down before the moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rksp_core.surprise import clip_surprise


def trained(steps: int, size: float = 0.1) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
    """Two parameters whose gradients were all of one size, so that v_hat is its square."""
    parameters = [nn.Parameter(torch.zeros(3, 5, dtype=torch.float64)), nn.Parameter(torch.zeros(4).double())]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
    return parameters, optimizer


def test_each_parameter_is_scaled_to_the_limit_by_itself_and_keeps_its_direction() -> None:
    (first, second), optimizer = trained(7)
    torch.manual_seed(0)
    direction = torch.randn(3, 5, dtype=torch.float64)
    direction *= 15**0.5 / direction.norm()
    first.grad = 0.1 * 12 * direction
    second.grad = torch.full_like(second, -0.05)
    assert clip_surprise(optimizer, 2.0) == pytest.approx(12, rel=1e-6)  # eps = 1e-8 is in the denominator
    torch.testing.assert_close(first.grad, 0.1 * 2 * direction, rtol=1e-6, atol=0)
    assert torch.equal(second.grad, torch.full_like(second, -0.05))


def test_the_first_step_has_no_usual_size() -> None:
    parameters, optimizer = trained(0)
    parameters[0].grad = torch.full_like(parameters[0], 1e6)
    assert clip_surprise(optimizer) == 0.0
    assert float(parameters[0].grad.min()) == 1e6


def test_one_outlier_moves_a_clipped_optimizer_by_about_one_step_and_leaves_no_memory() -> None:
    def after(clipped: bool) -> tuple[float, float]:
        (parameter, _), optimizer = trained(1000)
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, -100.0)
        if clipped:
            clip_surprise(optimizer)
        optimizer.step()
        return float((parameter.detach() - before).abs().max()), float(optimizer.state[parameter]["exp_avg_sq"].max())

    moved, remembered = after(clipped=True)
    assert moved < 0.01  # the first moment still points the other way
    moved_without, remembered_without = after(clipped=False)
    assert moved_without > 2 * moved
    assert remembered_without > 1000 * remembered


def test_an_optimizer_without_second_moments_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=r"second moments of Adam, which SGD"):
        clip_surprise(optimizer)
    with pytest.raises(ValueError, match="above 0"):
        clip_surprise(optimizer, 0.0)


def test_a_parameter_without_entries_is_passed_over() -> None:
    empty = nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.AdamW([empty])
    empty.grad = torch.zeros(0)
    optimizer.step()
    empty.grad = torch.zeros(0)
    assert clip_surprise(optimizer) == 0.0
