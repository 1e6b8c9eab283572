"""The two divergence labels differ in exactly one thing: what a single steep step means."""

import math

import pytest

from training.labels import Labels, judge


def judged(steps):
    labels = Labels()
    for step, (loss, norm) in enumerate(steps, start=1):
        labels = judge(labels, step, loss, norm)
    return labels.paper, labels.rksp


CALM = (2.0, 1.0)
STEEP = (2.0, 501.0)


@pytest.mark.parametrize(
    ("steps", "paper", "rksp"),
    [
        ([CALM] * 20, None, None),
        ([CALM, (50.0, 500.0)], None, None),  # both limits are exclusive
        ([CALM, (50.1, 1.0), CALM], 2, 2),
        ([CALM, STEEP, CALM], 2, None),
        ([STEEP] * 4 + [CALM] + [STEEP] * 4, 1, None),
        ([CALM] + [STEEP] * 5, 2, 6),
        ([CALM, (math.nan, 1.0)], 2, 2),
        ([CALM, (2.0, math.inf)], 2, 2),
        ([CALM, (2.0, math.nan)], 2, 2),
        ([STEEP, CALM, (math.inf, 1.0)], 1, 3),
    ],
)
def test_labels(steps, paper, rksp):
    assert judged(steps) == (paper, rksp)
