"""Spline layers against scipy's B-splines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch.nn import functional

from training.models.initialization import Initialization
from training.models.kan import DOMAIN, ORDER, SplineLayer, SplineNetwork, b_splines, uniform_knots
from training.models.norms import DeepNorm, SubLN

SIZES = pytest.mark.parametrize("basis", [4, 5, 8])


@SIZES
def test_the_basis_is_scipys(basis):
    knots = uniform_knots(basis).double()
    x = torch.linspace(-DOMAIN, DOMAIN, 101, dtype=torch.float64)[:-1]
    expected = BSpline.design_matrix(x.numpy(), knots.numpy(), ORDER).toarray()
    torch.testing.assert_close(b_splines(x, knots, ORDER).T, torch.from_numpy(expected), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_any_order_on_any_knots(order):
    knots = torch.from_numpy(np.sort(np.random.default_rng(0).uniform(-1, 1, 12)))
    x = torch.linspace(float(knots[order]), float(knots[-order - 1]), 50, dtype=torch.float64)[:-1]
    expected = BSpline.design_matrix(x.numpy(), knots.numpy(), order).toarray()
    torch.testing.assert_close(b_splines(x, knots, order).T, torch.from_numpy(expected), rtol=1e-10, atol=1e-13)


@SIZES
def test_the_basis_is_a_partition_of_unity_on_the_domain_and_zero_far_from_it(basis):
    knots = uniform_knots(basis).double()
    inside = b_splines(torch.linspace(-DOMAIN, DOMAIN, 201, dtype=torch.float64), knots, ORDER)
    assert inside.shape == (basis, 201)
    torch.testing.assert_close(inside.sum(0), torch.ones(201, dtype=torch.float64), rtol=1e-10, atol=0)
    assert (inside >= 0).all()
    assert not b_splines(torch.tensor([-100.0, 100.0], dtype=torch.float64), knots, ORDER).any()


def test_the_slope_of_a_spline_is_scipys():
    knots = uniform_knots(8).double()
    coefficients = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-2.9, 2.9, 40, dtype=torch.float64, requires_grad=True)
    (coefficients @ b_splines(x, knots, ORDER)).sum().backward()
    expected = BSpline(knots.numpy(), coefficients.numpy(), ORDER).derivative()(x.detach().numpy())
    torch.testing.assert_close(x.grad, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_a_layer_is_a_function_on_every_edge():
    torch.manual_seed(0)
    layer = SplineLayer(inputs=3, outputs=2, basis=5, gain=1.0).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    knots = layer.knots.numpy()
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(2):
            spline = BSpline(knots, layer.spline[j, :, i].detach().numpy(), ORDER)
            expected[:, j] += layer.base[j, i].detach() * functional.silu(x[:, i]) + torch.from_numpy(spline(x[:, i]))
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-10, atol=1e-14)


def test_layers_start_as_published():
    torch.manual_seed(0)
    layer = SplineLayer(inputs=64, outputs=64, basis=8, gain=1.0)
    assert layer.spline.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.base.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)  # Xavier


def test_the_gain_of_a_norm_scales_the_spline_layers_too():
    torch.manual_seed(0)
    network = SplineNetwork(64, 8, Initialization("published", DeepNorm, 2))
    assert network.up.spline.std().item() == pytest.approx(0.1 * 16**-0.25, rel=0.05)
    assert isinstance(SplineNetwork(64, 8, Initialization("published", SubLN, 2)).inner, torch.nn.LayerNorm)


def test_splines_of_bfloat16_numbers_are_computed_in_float32():
    """Under autocast the second layer reads bfloat16; its recursion subtracts neighbouring knots."""
    x, knots = torch.randn(64).bfloat16(), uniform_knots(8)
    values = b_splines(x, knots, ORDER)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, b_splines(x.float(), knots, ORDER), rtol=0, atol=0)
