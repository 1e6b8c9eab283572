"""Spectral norms of matrices: against the singular values, and found in the right places of a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rksp_core.profile import ModelProfile, WeightNorms
from rksp_core.profiling import profile_model
from rksp_core.weight_norms import EXACT, spectral_norm, weight_norms

from .test_capture import Model, tokens


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1, 5), (EXACT, 300)])
def test_a_small_matrix_has_its_largest_singular_value(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert spectral_norm(weight) == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-10)


def test_a_large_one_comes_close_from_below_and_is_the_same_each_time() -> None:
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))  # leading values as close as they get
    exact = float(torch.linalg.svdvals(weight)[0])
    found = spectral_norm(weight)
    assert 0.93 * exact < found <= exact * (1 + 1e-5)
    assert spectral_norm(weight) == found
    spiked = weight + 100 * torch.outer(torch.ones(400), torch.ones(500)) / math.sqrt(400 * 500)
    assert spectral_norm(spiked) == pytest.approx(float(torch.linalg.svdvals(spiked)[0]), rel=1e-4)


@pytest.mark.parametrize("size", [4, 2 * EXACT])
def test_what_is_not_finite_is_infinite(size: int) -> None:
    weight = torch.ones(size, size)
    weight[0, 0] = math.nan
    assert spectral_norm(weight) == math.inf
    assert spectral_norm(torch.ones(size, size, dtype=torch.bfloat16)) == pytest.approx(size, rel=1e-5)
    assert spectral_norm(torch.ones(0, size)) == 0


def test_the_blocks_and_the_head_are_told_apart() -> None:
    torch.manual_seed(0)
    model = Model()
    names = [name for name, module in model.named_modules() if name.startswith("layers.") and name.count(".") == 1]
    with torch.no_grad():
        inner = next(p for n, p in model.named_parameters() if n.startswith("layers.1.") and p.dim() == 2)
        inner.copy_(100 * inner)
    inside = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    heads = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("layers.")]
    expected = [max((float(torch.linalg.svdvals(w.detach())[0]) for w in ws), default=None) for ws in (inside, heads)]
    found = weight_norms(model, names)
    assert found.blocks == pytest.approx(expected[0], rel=1e-5)
    assert found.head == (None if expected[1] is None else pytest.approx(expected[1], rel=1e-5))


def test_a_profile_carries_them_through_its_file() -> None:
    torch.manual_seed(0)
    profile = profile_model(Model(), tokens())
    assert profile.weights.blocks is not None
    assert ModelProfile.from_dict(profile.to_dict()).weights == profile.weights
    without = profile.to_dict() | {"weight_norms": {}}
    assert ModelProfile.from_dict(without).weights == WeightNorms()  # of an older version


@pytest.mark.parametrize("size", [4, 2 * EXACT])
def test_zeros_have_none_and_eight_bits_are_read(size: int) -> None:
    assert spectral_norm(torch.zeros(size, size)) == 0
    assert spectral_norm(torch.ones(size, size).to(torch.float8_e4m3fn)) == pytest.approx(size, rel=1e-5)


def test_a_parametrized_matrix_counts_as_it_is_used_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2))
    with torch.no_grad():
        model[0][0].weight.mul_(100)
        head = float(torch.linalg.svdvals(model[1].weight)[0])
    nn.utils.parametrizations.spectral_norm(model[0][0], n_power_iterations=100)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = weight_norms(model, ["0"])
    assert found.blocks == pytest.approx(1.0, rel=1e-3)
    assert found.head == pytest.approx(head, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model[0][0].training
