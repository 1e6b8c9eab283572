"""The operator: planted ones come back, the oracle agrees, rescaling changes nothing, bad data have a status."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.dmd import whitened_dmd
from rksp_core.eigensystem import eigensystem
from rksp_core.moments import Moments
from rksp_core.profile import LayerProfile
from rksp_core.profiling import profile_layer
from rksp_core.spectrum import mode_residuals

from .oracle import algorithm_1
from .planted import moments_of, random_operator, snapshots, spectral_distance

FIGURES = (
    "near_unit_mass",
    "expansive_mass",
    "contractive_mass",
    "spectral_radius",
    "eigenvector_condition",
    "nonlinearity_ratio",
    "update_ratio",
    "sigma_max",
    "henrici_departure",
)


def assert_same_figures(layer: LayerProfile, expected: LayerProfile, *, rel: float) -> None:
    got, want = (one.to_dict(eigenvalues=False) for one in (layer, expected))
    got, want = got | got.pop("reliable"), want | want.pop("reliable")
    for name, value in want.items():
        assert got[name] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), name


def test_a_planted_operator_is_found_exactly() -> None:
    planted = random_operator(12)
    operator = whitened_dmd(moments_of(*snapshots(planted, 400)))
    # Eigenvalues of a dense non-normal matrix: rounding times their condition, hence not 1e-10 relative to 1e-15.
    assert spectral_distance(eigensystem(operator.matrix).eigenvalues, torch.linalg.eigvals(planted)) < 1e-10
    # An exactly linear block leaves no residual; through moments that is 1e-7, the root of float64's rounding.
    assert operator.nonlinearity_ratio == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("eps_mode", ["relative", "absolute"])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_agrees_with_algorithm_1_from_snapshots(eps_mode: str, noise: float) -> None:
    x, y = snapshots(random_operator(16), 300, noise=noise)
    moments = moments_of(x, y)
    layer = profile_layer("block", moments, depth=1, eps_mode=eps_mode)  # type: ignore[arg-type]
    oracle = algorithm_1(x.numpy().T, y.numpy().T, relative=eps_mode == "relative")
    for name in FIGURES:
        assert getattr(layer, name) == pytest.approx(oracle[name], rel=1e-9, abs=1e-12), name
    assert layer.reliable.modes == oracle["reliable_modes"]
    assert spectral_distance(layer.eigenvalues, oracle["eigenvalues"]) < 1e-10
    operator = whitened_dmd(moments, eps_mode=eps_mode)  # type: ignore[arg-type]
    values, residuals = mode_residuals(operator, eigensystem(operator.matrix))
    for value, residual in zip(values.numpy(), residuals.numpy(), strict=True):
        twin = np.argmin(np.abs(oracle["eigenvalues"] - value))
        assert residual == pytest.approx(oracle["mode_residuals"][twin], abs=1e-7)


@given(power=st.sampled_from([-10, 10]), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=8)
def test_rescaling_the_stream_changes_no_reported_number(power: int, seed: int) -> None:
    x, y = snapshots(random_operator(10, seed=seed), 200, noise=0.3, seed=seed)
    one = profile_layer("block", moments_of(x, y), depth=3)
    other = profile_layer("block", moments_of(x * 2.0**power, y * 2.0**power), depth=3)
    assert_same_figures(other, one, rel=1e-9)


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=10)
def test_an_orthogonal_change_of_coordinates_changes_no_reported_number(seed: int) -> None:
    x, y = snapshots(random_operator(8, seed=seed), 150, noise=0.3, seed=seed)
    rotation = torch.linalg.qr(random_operator(8, seed=seed + 1)).Q
    one = profile_layer("block", moments_of(x, y), depth=3)
    other = profile_layer("block", moments_of(x @ rotation, y @ rotation), depth=3)
    # Not 1e-10: the rotated data are rounded anew, and eigenvalues amplify that by their condition.
    assert_same_figures(other, one, rel=1e-7)


def test_fewer_samples_than_channels_are_profiled_from_snapshots() -> None:
    x, y = snapshots(random_operator(60), 40, noise=0.1)
    kept, folded = Moments(60, samples=40), Moments(60)
    kept.update(x, y)
    folded.update(x, y)
    a, b = whitened_dmd(kept), whitened_dmd(folded)
    assert a.rank == b.rank == 10
    assert a.status == b.status == ("rank_capped",)
    assert spectral_distance(torch.linalg.eigvals(a.matrix), torch.linalg.eigvals(b.matrix)) < 1e-9


class TestRank:
    def test_a_lost_direction_is_left_out_and_does_not_blow_up(self) -> None:
        """A LayerNorm output has zero mean over channels: one direction less. The literal pinv reads noise there."""
        x, y = snapshots(random_operator(32), 400, noise=0.1)
        x = x - x.mean(1, keepdim=True)
        moments = Moments(32)
        moments.update(x.float(), y.float())
        operator = whitened_dmd(moments)
        assert operator.rank == 31
        assert operator.status == ()
        oracle = algorithm_1(x.float().numpy().T, y.float().numpy().T, floor=1e-9)
        mine = torch.linalg.eigvals(operator.matrix)
        assert spectral_distance(mine, oracle["eigenvalues"]) < 1e-6
        literal = algorithm_1(x.float().numpy().T, y.float().numpy().T)
        assert literal["spectral_radius"] > 100 * float(mine.abs().max())

    def test_low_rank_data_say_rank_deficient(self) -> None:
        x, y = snapshots(random_operator(32), 400)
        x[:, 10:] = 0.0
        assert whitened_dmd(moments_of(x, y)).status == ("rank_deficient",)

    def test_repeated_tokens_count_once(self) -> None:
        """128 samples, 16 of them distinct: a full-rank fit would interpolate, so m is capped at a quarter of 16."""
        x, y = snapshots(random_operator(12), 16, noise=0.3)
        operator = whitened_dmd(moments_of(x.repeat(8, 1), y.repeat(8, 1)))
        assert operator.rank == 4
        assert operator.status == ("rank_capped",)

    def test_an_asked_for_rank_that_interpolates_says_so(self) -> None:
        x, y = snapshots(random_operator(12), 16, noise=0.3)
        assert "interpolating" in whitened_dmd(moments_of(x, y), rank=10).status

    def test_nothing_left_is_a_status_not_an_error(self) -> None:
        layer = profile_layer("block", moments_of(torch.ones(5, 4), torch.ones(5, 4)), depth=2)
        assert layer.rank == 0
        assert layer.near_unit_mass is None
        assert layer.reliable.modes == 0

    def test_bfloat16_rounding_is_not_data(self) -> None:
        """A direction of 1e-6 of the scale is below the rounding of bfloat16 (2^-9) and above that of float32."""
        x, y = snapshots(random_operator(8), 300, noise=0.1)
        x[:, 7] = 1e-3 * x[:, 7]
        wide, narrow = Moments(8), Moments(8)
        wide.update(x.float(), y.float())
        narrow.update(x.bfloat16(), y.bfloat16())
        assert whitened_dmd(wide).rank == 8
        assert whitened_dmd(narrow).rank == 7

    def test_randomized_rank_r_equals_the_leading_directions(self) -> None:
        """Variances that fall off steeply: two power iterations find the leading directions to high accuracy."""
        d, r = 40, 8
        x = torch.randn(500, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x * torch.logspace(0, -6, d, dtype=torch.float64)
        y = x @ random_operator(d).T
        moments = moments_of(x, y)
        sketched = whitened_dmd(moments, rank=r)
        xc, yc = x - x.mean(0), y - y.mean(0)
        basis = torch.linalg.svd(xc, full_matrices=False).Vh[:r].T
        reduced = torch.linalg.lstsq(xc @ basis, yc @ basis).solution.T
        assert spectral_distance(torch.linalg.eigvals(sketched.matrix), torch.linalg.eigvals(reduced)) < 1e-6


def test_an_identity_block_is_not_informative_yet() -> None:
    x, _ = snapshots(random_operator(8), 100)
    layer = profile_layer("block", moments_of(x, x.clone()), depth=4)
    assert layer.status == ("degenerate_update",)
    assert layer.nonlinearity_ratio is None
    assert layer.near_unit_mass == 1.0
    assert layer.eigenvector_condition == 1.0
    assert layer.kreiss_constant == layer.transient_growth == 1.0
    assert layer.kreiss_classical == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({}, "at least 2 samples"),
    ],
)
def test_bad_arguments(call: dict[str, object], sentence: str) -> None:
    moments = Moments(3)
    if call:
        moments.update(torch.randn(9, 3), torch.randn(9, 3))
    with pytest.raises(ValueError, match=sentence):
        whitened_dmd(moments, **call)
