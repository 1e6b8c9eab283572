"""SAM against its algorithm written plainly, and that it leaves no trace on the weights."""

import pytest
import torch
from torch import nn

from training.stabilizers.sam import SAM


def quadratic(weights: list[torch.Tensor]) -> torch.Tensor:
    """A loss whose gradient is not linear, so that the place where it is taken matters."""
    return sum((weight**4).sum() + (weight * torch.arange(weight.numel())).sum() for weight in weights)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in (5, 3)]


def test_the_second_gradient_is_taken_rho_along_the_first():
    """Foret et al. 2021, Algorithm 1; the norm is over all parameters together."""
    rho, moved = 0.3, weights()
    quadratic(moved).backward()
    first = torch.cat([weight.grad for weight in moved])
    before = torch.cat([weight.detach() for weight in moved])
    there = (before + rho * first / first.norm()).requires_grad_()
    (expected,) = torch.autograd.grad(quadratic([there[:5], there[5:]]), there)
    with SAM(rho).perturbed(moved):
        torch.testing.assert_close(torch.cat([weight.detach() for weight in moved]), there.detach(), rtol=1e-12, atol=0)
        for weight in moved:
            weight.grad = None
        quadratic(moved).backward()
    torch.testing.assert_close(torch.cat([weight.grad for weight in moved]), expected, rtol=1e-12, atol=0)


def test_the_weights_come_back_bitwise_whatever_happens():
    moved = [nn.Parameter(weight.float()) for weight in weights()]
    for weight in moved:
        weight.grad = torch.full_like(weight, 1e-3)
    before = [weight.detach().clone() for weight in moved]

    def fail() -> None:
        with SAM(1e4).perturbed(iter(moved)):
            assert not any(torch.equal(*pair) for pair in zip(moved, before, strict=True))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(torch.equal(*pair) for pair in zip(moved, before, strict=True))


@pytest.mark.parametrize("gradient", [None, 0.0, float("nan"), float("inf")])
def test_without_a_direction_the_weights_stay(gradient):
    [weight, other] = weights()
    weight.grad = None if gradient is None else torch.full_like(weight, gradient)
    before = weight.detach().clone()
    with SAM(0.1).perturbed([weight, other]):
        assert torch.equal(weight, before)
    assert torch.equal(weight, before)
