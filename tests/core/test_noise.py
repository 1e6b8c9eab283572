"""The jackknife against the truth: the spread of profiles over probes that are drawn anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rksp_core.features import SPECTRAL, figures
from rksp_core.noise import profile_noise
from rksp_core.profiling import profile_model
from rksp_core.wasserstein import distances

WIDTH, SEQUENCES, LENGTH, GROUPS = 6, 64, 8, 8


class Block(nn.Module):
    """Not linear, so that its operator depends on the sample: what a linear block does is known without any noise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.sin(2.0 * self.inner(h))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(1))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def probe(seed: int) -> Tensor:
    """Tokens of one sequence lie around a centre of their own: a sequence is one observation rather than eight."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SEQUENCES, 1, WIDTH, generator=generator, dtype=torch.float64)
    return centres + 0.5 * torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def drawn(model: Model):
    return [figures(profile_model(model, probe(seed))) for seed in range(30)]


@pytest.fixture(scope="module")
def estimated(model: Model):
    return [profile_noise(model, probe(seed), groups=GROUPS) for seed in range(4)]


# The masses jump with one mode over a threshold from one probe to the next, which a jackknife cannot know.
SMOOTH = ("spectral_radius_max", "log_kreiss_mean", "log_sigma_max", "log_henrici_max", "log_growth_max")


@pytest.mark.parametrize("name", SMOOTH)
def test_the_standard_error_is_the_spread_over_probes(drawn, estimated, name: str):
    truth = np.std([each.numbers[name] for each in drawn], ddof=1)
    found = math.sqrt(np.mean([noise[name] ** 2 for noise in estimated]))
    # Four estimates of seven degrees of freedom each and thirty draws: 13 % of error each, and a jackknife's bias.
    assert 0.5 < found / truth < 2.0


def test_the_error_of_a_distance_is_that_of_its_quantiles(drawn, estimated):
    """Two Gaussian errors of one size differ by 2/sqrt(pi) of it on average."""
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    apart = np.mean([distances(one.curves, other.curves)["wasserstein_mean"] for one, other in pairs])
    found = np.mean([noise["wasserstein_mean"] for noise in estimated])
    assert 0.5 < found / (apart * math.sqrt(math.pi) / 2) < 2.0


def test_tokens_of_one_sequence_count_once(drawn, model: Model):
    """The same tokens dealt out one by one look four times as certain as they are: whole sequences have to go."""
    name = "log_sigma_max"
    truth = np.std([each.numbers[name] for each in drawn], ddof=1)
    singly = [profile_noise(model, probe(seed).flatten(0, 1)[:, None], groups=GROUPS)[name] for seed in range(3)]
    assert math.sqrt(np.mean(np.square(singly))) < 0.7 * truth


def test_a_linear_model_has_no_noise():
    torch.manual_seed(1)
    linear = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))).double()
    noise = profile_noise(linear, probe(0))
    # The whitening regularizes by 1e-5 of the variance, which differs between the groups.
    assert all(noise[name] < 1e-3 for name in noise if name.startswith(("spectral", "wasserstein")))


def test_every_feature_of_the_spectra_has_an_error_and_every_draw_is_the_same(model: Model):
    noise = profile_noise(model, probe(0), groups=3, samples=100)
    assert set(noise) == {*SPECTRAL, "wasserstein_mean", "wasserstein_max"}
    assert profile_noise(model, {"h": probe(0)}, groups=3, samples=100) == noise


def test_more_groups_than_sequences_leave_out_one_sequence_each_and_one_sequence_says_nothing(model: Model):
    assert profile_noise(model, probe(0)[:3], groups=9) == profile_noise(model, probe(0)[:3], groups=3)
    assert profile_noise(model, probe(0)[:1]) == {}
    with pytest.raises(ValueError, match="groups must be at least 2, got 1"):
        profile_noise(model, probe(0), groups=1)
