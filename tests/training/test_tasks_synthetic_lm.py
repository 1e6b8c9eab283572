"""The synthetic language of App. D.2: its segments, its ranges, its 20 000 and 2 000 sequences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rksp_core.errors import ConfigError
from training.tasks import EVALUATION, PROBE, TRAINING
from training.tasks.synthetic_lm import FIRST_ID, NOISE, REPETITION, RUN, SyntheticLM

PUBLISHED = {"vocabulary": 10_000, "length": 256, "training_sequences": 20_000, "validation_sequences": 2_000}


def written_out(task: SyntheticLM, split: int, number: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The same draws, segment after segment; also (kind, size) of each segment that begins before T."""
    random = np.random.default_rng([task.seed, split, number])
    count = task.length // 4 + 1
    kinds = random.integers(3, size=count)
    patterns, repeats, lengths = (random.integers(low, high, count) for low, high in ((2, 6), (2, 5), (5, 16)))
    sizes = [
        p * r if kind == REPETITION else n for kind, p, r, n in zip(kinds, patterns, repeats, lengths, strict=True)
    ]
    top = [task.vocabulary - (size - 1 if kind == RUN else 0) for kind, size in zip(kinds, sizes, strict=True)]
    firsts = random.integers(FIRST_ID, np.array(top))
    noise = random.integers(FIRST_ID, task.vocabulary, task.length).tolist()
    tokens, segments = [], []
    for kind, size, pattern, first in zip(kinds, sizes, patterns, firsts, strict=True):
        if len(tokens) >= task.length:
            break
        here = noise[len(tokens) :]
        segments.append((kind, size))
        if kind == REPETITION:
            tokens += (here[:pattern] * 4)[:size]
        elif kind == RUN:
            tokens += range(first, first + size)
        else:
            tokens += here[:size]
    return tokens[: task.length], segments


@settings(max_examples=50)
@given(
    vocabulary=st.integers(25, 300), length=st.integers(2, 300), seed=st.integers(0, 9), number=st.integers(0, 10**6)
)
def test_a_sequence_is_a_row_of_segments_cut_at_its_length(vocabulary, length, seed, number):
    task = SyntheticLM(vocabulary, length, 10, 10, seed)
    sequence = task.sequence(TRAINING, number)
    assert sequence.shape == (length,)
    assert FIRST_ID <= sequence.min() <= sequence.max() < vocabulary
    assert sequence.tolist() == written_out(task, TRAINING, number)[0]


def test_kinds_and_sizes_are_those_of_the_paper_and_equally_likely():
    task = SyntheticLM(**PUBLISHED, seed=42)
    segments = [each for number in range(300) for each in written_out(task, TRAINING, number)[1][:10]]
    sizes = {kind: {size for each, size in segments if each == kind} for kind in (REPETITION, RUN, NOISE)}
    assert sizes[REPETITION] == {p * r for p in range(2, 6) for r in range(2, 5)}
    assert sizes[RUN] == sizes[NOISE] == set(range(5, 16))
    shares = np.bincount([kind for kind, _ in segments]) / len(segments)
    assert shares == pytest.approx(1 / 3, abs=0.04)  # 4.6 standard deviations of 3000 draws


def test_runs_reach_the_last_id_and_begin_at_the_first():
    sequences = np.stack([SyntheticLM(25, 256, 10, 10, seed=1).sequence(TRAINING, number) for number in range(50)])
    assert (sequences.min(), sequences.max()) == (10, 24)


def test_the_splits_are_those_of_the_paper():
    task = SyntheticLM(**PUBLISHED, seed=42)
    assert task.evaluation_items == 2_000
    epoch = task.batch(TRAINING, 1, 32)
    assert epoch.inputs.shape == (32, 256)


@pytest.mark.parametrize("stream", [TRAINING, EVALUATION, PROBE])
def test_sequences_come_back_after_an_epoch_and_not_before(stream):
    task = SyntheticLM(1000, 64, 12, 6, seed=3)
    items = 12 if stream == TRAINING else 6
    epochs = [{tuple(row) for row in task.batch(stream, step, items).inputs.tolist()} for step in (1, 2)]
    assert len(epochs[0]) == items
    assert epochs[0] == epochs[1]


def test_no_sequence_is_in_two_splits():
    task = SyntheticLM(1000, 64, 40, 40, seed=3)
    rows = [tuple(row) for stream in (TRAINING, EVALUATION, PROBE) for row in task.batch(stream, 1, 40).inputs.tolist()]
    assert len(set(rows)) == 120


def test_the_target_of_a_token_is_the_next_one_and_the_last_has_none():
    inputs, targets = SyntheticLM(1000, 64, 12, 6, seed=3).batch(TRAINING, 1, 4)
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    assert (targets[:, -1] == -100).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocabulary": 24}, "needs a vocabulary of at least 25 tokens, got 24"),
        ({"length": 1}, "needs sequences of at least 2 tokens, got length 1"),
    ],
)
def test_a_language_that_is_too_small(sizes, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticLM(**PUBLISHED | sizes, seed=0)
