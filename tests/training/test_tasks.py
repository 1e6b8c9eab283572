"""Associative recall is the task of the paper, and a batch depends on (seed, stream, step) alone."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.tasks import EVALUATION, TRAINING
from training.tasks.associative_recall import AssociativeRecall


@given(vocabulary=st.integers(8, 300), pairs=st.integers(1, 4), extra=st.integers(0, 20), step=st.integers(0, 2**40))
def test_the_label_is_the_value_that_followed_the_query(vocabulary, pairs, extra, step):
    length = 2 * pairs + 1 + extra
    batch = AssociativeRecall(vocabulary, length, pairs, seed=1).batch(TRAINING, step, 16)
    assert batch.inputs.shape == (16, length)
    assert batch.inputs.dtype == torch.int64
    for sequence, label in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert all(0 <= token < vocabulary for token in sequence)
        keys, values, query = sequence[0 : 2 * pairs : 2], sequence[1 : 2 * pairs : 2], sequence[-1]
        assert len(set(keys)) == pairs
        assert values[keys.index(query)] == label
        assert sequence.count(query) == 2  # its pair and the question: the answer is unique


def test_a_batch_is_a_function_of_seed_stream_and_step():
    task = AssociativeRecall(256, 64, 4, seed=42)
    first = task.batch(TRAINING, 7, 32).inputs
    assert torch.equal(first, AssociativeRecall(256, 64, 4, seed=42).batch(TRAINING, 7, 32).inputs)
    for other in (
        task.batch(TRAINING, 8, 32),
        task.batch(EVALUATION, 7, 32),
        AssociativeRecall(256, 64, 4, seed=43).batch(TRAINING, 7, 32),
    ):
        assert not torch.equal(first, other.inputs)


def test_loss_and_accuracy_look_at_the_last_position_only():
    task = AssociativeRecall(8, 5, 2, seed=0)
    targets = torch.tensor([5, 6])
    logits = torch.randn(2, 5, 8)
    logits[:, -1] = 0.0
    assert task.loss(logits, targets).item() == torch.tensor(8.0).log().item()
    logits[0, -1, 5] = 100.0
    assert task.accuracy(logits, targets).item() == 0.5
    assert math.isclose(task.loss(logits, targets).item(), math.log(8) / 2, rel_tol=1e-6)
