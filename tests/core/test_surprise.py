"""Surprise clipping: a gradient of the usual size passes untouched; a larger one is scaled down before the moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rksp_core.surprise import SurpriseClip, clip_surprise, obstacle


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


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], str | None, str | None]] = [
    (torch.optim.Adam, None, None),
    (torch.optim.AdamW, None, None),
    (torch.optim.NAdam, None, None),
    (torch.optim.RAdam, None, None),
    (torch.optim.SGD, "SGD does not keep", "SGD does not keep"),
    (torch.optim.Adafactor, "Adafactor does not keep", "Adafactor does not keep"),
    (torch.optim.Adamax, "Adamax does not show before its first step", "Adamax does not keep"),
]


@pytest.mark.parametrize(("kind", "before", "after"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_an_optimizer_says_beforehand_whether_it_can_be_clipped(
    kind: type[torch.optim.Optimizer], before: str | None, after: str | None
) -> None:
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = kind([parameter])  # type: ignore[call-arg]
    for said in (before, after):
        found = obstacle(optimizer)
        assert (
            found is None
            if said is None
            else found is not None and f"the second moments of Adam, which {said}" in found
        )
        if found is None:
            clip_surprise(optimizer)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def jumping(clip: str, **settings: Any) -> torch.Tensor:
    """The weights after five even gradients and one a thousand times as large, clipped in some way."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **settings)
    inputs = torch.randn(8, 4, dtype=torch.float64)
    hook = SurpriseClip([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled="scaled" in clip)  # type: ignore[attr-defined]

    def closure(size: float = 1.0) -> torch.Tensor:
        optimizer.zero_grad()
        loss = size * layer(inputs).square().sum()
        scaler.scale(loss).backward()
        return loss

    for step in range(6):
        size = 1000.0 if step == 5 else 1.0
        hook.limit = 1.0 if "hook" in clip and step == 5 else None
        if clip == "hook, closure":
            optimizer.step(lambda size=size: closure(size))
            continue
        closure(size)
        if clip == "by hand" and step == 5:
            assert clip_surprise(optimizer) > 100
        if "unscaled" in clip:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    hook.remove()
    assert not optimizer._optimizer_step_pre_hooks
    return torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", ["hook", "hook, closure", "hook, scaled", "hook, scaled and unscaled"])
def test_a_step_is_clipped_wherever_its_gradients_come_from(clip: str, fused: bool) -> None:
    """From a closure, which runs inside of the step; scaled, as a fused optimizer under a GradScaler takes them."""
    by_hand = jumping("by hand", fused=fused)
    torch.testing.assert_close(jumping(clip, fused=fused), by_hand, rtol=1e-12, atol=0)
    assert (by_hand - jumping("none", fused=fused)).abs().max() > 1e-3
    assert torch.equal(jumping("none", fused=fused), jumping("none, scaled", fused=fused))


def test_a_step_that_a_scaler_leaves_out_is_left_out() -> None:
    parameters, optimizer = trained(3)
    before = [parameter.detach().clone() for parameter in parameters]
    SurpriseClip([optimizer]).limit = 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # type: ignore[attr-defined]
    scaler.scale(sum((torch.inf * parameter).sum() for parameter in parameters)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(parameter, start) for parameter, start in zip(parameters, before, strict=True))
