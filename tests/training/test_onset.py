"""The onset on sequences whose answer is known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.experiments.onset import CALM, FACTOR, MARGIN, onset


def flat(steps: int, loss: float = 2.0, norm: float = 1.0) -> tuple[list[float | None], list[float | None]]:
    return [loss] * steps, [norm] * steps


def test_a_healthy_run_that_breaks_at_once_has_its_onset_there() -> None:
    losses, norms = flat(100)
    losses[99] = None
    assert onset(losses, norms, 100) == 100


def test_a_spike_that_healed_is_no_onset() -> None:
    losses, norms = flat(300)
    losses[149], norms[160] = 9.0, 400.0
    losses[280:] = [2.0 + 0.4 * step for step in range(20)]  # step 281 is still at 2.0, 282 within the margin, 283 not
    assert onset(losses, norms, 300) == 283


@pytest.mark.parametrize(("calm", "expected"), [(CALM, 51 + CALM), (CALM - 1, 50)])
def test_so_many_calm_steps_separate_two_troubles(calm: int, expected: int) -> None:
    losses, norms = flat(80)
    losses[49] = 9.0  # step 50
    losses[50 + calm :] = [9.0] * (30 - calm)
    assert onset(losses, norms, 80) == expected


def test_a_slow_rise_begins_where_it_leaves_the_best_median_by_the_margin() -> None:
    """Down by .01 a step to 1.0 at step 101, then up by .02: the best median of 11 is that around step 101."""
    steps = np.arange(1, 301)
    losses = np.where(steps <= 101, 2.01 - 0.01 * steps, 1.0 + 0.02 * (steps - 101))
    best = min(np.median(losses[at : at + 11]) for at in range(290))
    expected = int(steps[(steps > 101) & (losses > best + MARGIN)][0])
    assert onset(list(losses), [1.0] * 300, 300) == expected
    assert expected == pytest.approx(101 + MARGIN / 0.02, abs=3)


def test_a_gradient_norm_counts_from_so_many_times_its_median() -> None:
    losses, norms = flat(100)
    norms[89:] = [FACTOR * 1.001] * 11  # they raise the median of the 50 steps before only once they are half of them
    assert onset(losses, norms, 100) == 90
    norms[89:] = [FACTOR] * 11
    assert onset(losses, norms, 100) == 100


def test_a_gradient_norm_that_grows_slowly_is_usual() -> None:
    """By 3 % a step it doubles in 23 steps: 2.1 times the median of the 50 before, which lies 25.5 steps back."""
    assert onset([2.0] * 200, [1.03**step for step in range(200)], 200) == 200


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_is_not_finite_is_trouble(value: float | None) -> None:
    losses, norms = flat(60)
    norms[56:] = [value] * 4
    assert onset(losses, norms, 60) == 57


@pytest.mark.parametrize("steps", [1, 2, CALM, 50])
def test_a_run_that_never_got_on_its_feet_has_its_onset_at_the_start(steps: int) -> None:
    assert onset([None] * steps, [None] * steps, steps) == 1


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (2, 1), (CALM, 1), (50, 50)])
def test_a_level_of_nearly_all_steps_is_no_trouble_once_it_is_usual(steps: int, expected: int) -> None:
    """60 from step 2 on: the median of the first steps is 60 itself from step 4 on, and nothing later is above it."""
    assert onset([2.0, *[60.0] * (steps - 1)], [1.0] * steps, steps) == expected


def test_losses_that_were_never_finite_before_tell_no_best() -> None:
    losses: list[float | None] = [None, *[3.0] * 20]
    assert onset(losses, [1.0] * 21, 21) == 21  # step 2 has nothing to compare with, so it is calm


@given(
    losses=st.lists(st.none() | st.floats(0, 60), min_size=1, max_size=80),
    norms=st.lists(st.none() | st.floats(0, 1e4), min_size=80, max_size=80),
)
def test_it_is_one_of_the_steps_and_sees_none_after_the_divergence(
    losses: list[float | None], norms: list[float | None]
) -> None:
    found = onset(losses, norms, len(losses))
    assert 1 <= found <= len(losses)
    assert onset([*losses, 1.0, None], norms + norms, len(losses)) == found


@given(scale=st.sampled_from([2.0**power for power in range(-8, 9)]), seed=st.integers(0, 99))
def test_the_unit_of_the_gradient_does_not_matter(scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, norms = list(random.normal(2, 0.2, 60)), random.lognormal(0, 1.5, 60)
    assert onset(losses, list(norms), 60) == onset(losses, list(scale * norms), 60)
