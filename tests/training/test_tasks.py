"""Every task: a batch depends on (seed, stream, step) alone. And associative recall is the task of the paper."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rksp_core.errors import ConfigError
from tests.training import small_tasks
from training.build import build_task
from training.config import parse_config
from training.loop import train
from training.ranks import Ranks
from training.schema.task import Images, SyntheticLM
from training.tasks import EVALUATION, PROBE, TRAINING, Batch
from training.tasks.associative_recall import AssociativeRecall
from training.tasks.epochs import chosen
from training.tasks.evaluation import evaluate
from training.tasks.next_token import NOT_ASKED, NextToken

ROOT = Path(__file__).parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("name", small_tasks.NAMES)
def test_a_batch_is_a_function_of_seed_stream_and_step(tmp_path, name):
    section = small_tasks.section(name, tmp_path)
    task, again, reseeded = (build_task(section, seed) for seed in (42, 42, 43))
    first = task.batch(TRAINING, 7, 8)
    for stream, step in ((TRAINING, 8), (EVALUATION, 7), (PROBE, 7)):
        assert not same(first, task.batch(stream, step, 8))
    assert same(first, task.batch(TRAINING, 7, 8))  # whatever was drawn in between
    assert same(first, again.batch(TRAINING, 7, 8))
    assert not same(first, reseeded.batch(TRAINING, 7, 8))


@pytest.mark.parametrize("name", small_tasks.NAMES)
def test_a_batch_leaves_the_global_random_state_alone(tmp_path, name):
    task = build_task(small_tasks.section(name, tmp_path), seed=42)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is the point
    expected = torch.rand(1), np.random.random()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    task.batch(TRAINING, 1, 8)
    assert (torch.rand(1), np.random.random()) == expected  # noqa: NPY002


@pytest.mark.parametrize("name", small_tasks.NAMES)
def test_a_batch_is_one_dense_tensor_of_the_kind_that_models_take(tmp_path, name):
    task = build_task(small_tasks.section(name, tmp_path), seed=42)
    for stream in (TRAINING, PROBE, EVALUATION):
        inputs, targets = task.batch(stream, 1, 8)
        assert len(inputs) == len(targets) == 8
        assert inputs.is_contiguous()  # the probe is written as safetensors
        assert inputs.dtype == (torch.float32 if task.inputs_name == "pixel_values" else torch.int64)
        assert targets.dtype == torch.int64


def test_fresh_processes_draw_the_same_batches_in_any_order(tmp_path):
    here = small_tasks.hashes(tmp_path, [3, 1])
    command = [sys.executable, "-m", "tests.training.small_tasks", str(tmp_path), json.dumps([3, 1])]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == here


@given(items=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_takes_each_item_once_and_every_epoch_has_its_own_order(items, size, seed):
    steps = -(-3 * items // size)
    drawn = np.concatenate([chosen(items, seed, step, size) for step in range(1, steps + 1)])[: 3 * items]
    epochs = drawn.reshape(3, items)
    assert (np.sort(epochs) == np.arange(items)).all()
    if items > 12:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert not np.array_equal(epochs[0], chosen(items, (seed + 1) % 2**32, 1, items))


@given(items=st.integers(1, 40), seed=st.integers(0, 9), step=st.integers(1, 2**40))
def test_the_size_of_a_batch_does_not_change_what_comes_when(items, seed, step):
    halves = [chosen(items, seed, each, 4) for each in (2 * step - 1, 2 * step)]
    assert np.array_equal(np.concatenate(halves), chosen(items, seed, step, 8))


@given(
    vocabulary=st.integers(8, 300),
    pairs=st.integers(1, 4),
    queries=st.integers(1, 4),
    extra=st.integers(0, 20),
    step=st.integers(0, 2**40),
)
def test_the_labels_are_the_values_that_followed_the_queries(vocabulary, pairs, queries, extra, step):
    queries = min(queries, pairs)
    length = 2 * pairs + queries + extra
    batch = AssociativeRecall(vocabulary, length, pairs, seed=1, queries=queries).batch(TRAINING, step, 16)
    assert batch.inputs.shape == (16, length)
    assert batch.targets.shape == (16, queries)
    for sequence, labels in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert all(0 <= token < vocabulary for token in sequence)
        keys, values, asked = sequence[0 : 2 * pairs : 2], sequence[1 : 2 * pairs : 2], sequence[-queries:]
        assert len(set(keys)) == pairs
        assert len(set(asked)) == queries
        for query, label in zip(asked, labels, strict=True):
            assert values[keys.index(query)] == label
            assert sequence.count(query) == 2  # its pair and the question: the answer is unique


def test_one_query_is_the_first_of_several():
    """So the form of the paper is what it was before there could be more."""
    one, more = (AssociativeRecall(32, 12 + queries, 6, seed=3, queries=queries) for queries in (1, 6))
    (inputs, label), (others, labels) = (task.batch(TRAINING, 7, 64) for task in (one, more))
    assert torch.equal(inputs[:, :13], others[:, :13])
    assert torch.equal(label[:, 0], labels[:, 0])


def test_several_queries_come_in_any_order():
    """Each of the 6 orders of three pairs about as often: 100 of 600, standard deviation 9."""
    batch = AssociativeRecall(8, 9, 3, seed=0, queries=3).batch(TRAINING, 1, 600)
    orders = (batch.inputs[:, -3:, None] == batch.inputs[:, None, 0:6:2]).int().argmax(dim=2)
    counts = torch.unique(orders, dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert 55 < counts.min() <= counts.max() < 145


def test_more_queries_than_pairs_are_refused():
    with pytest.raises(ConfigError, match=r"task\.queries = 3 needs as many pairs, got task\.pairs = 2"):
        AssociativeRecall(8, 9, 2, seed=0, queries=3)


@pytest.mark.parametrize("queries", [1, 2])
def test_recall_looks_at_the_last_positions_only(queries):
    task = AssociativeRecall(8, 6, 2, seed=0, queries=queries)
    targets = torch.tensor([[5, 7], [6, 7]])[:, :queries]
    logits = torch.randn(2, 6, 8)
    logits[:, -queries:] = 0.0
    assert task.loss(logits, targets).item() == torch.tensor(8.0).log().item()
    logits[0, torch.arange(-queries, 0), targets[0]] = 100.0
    assert task.accuracy(logits, targets).item() == 0.5
    assert math.isclose(task.loss(logits, targets).item(), math.log(8) / 2, rel_tol=1e-6)


def test_next_token_counts_every_token_that_has_a_successor():
    task, logits = NextToken(), torch.randn(3, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (3, 5))
    targets[:, -1] = NOT_ASKED
    pairs = [(logits[b, t], targets[b, t]) for b in range(3) for t in range(4)]
    losses = [-torch.log_softmax(row, dim=0)[token].item() for row, token in pairs]
    assert task.loss(logits, targets).item() == pytest.approx(np.mean(losses), rel=1e-10)
    right = [row.argmax().item() == token.item() for row, token in pairs]
    assert task.accuracy(logits, targets).item() == pytest.approx(np.mean(right), rel=1e-6)  # counted in float32


@pytest.mark.parametrize("name", small_tasks.NAMES)
def test_evaluating_in_pieces_is_evaluating_at_once(tmp_path, name):
    task = build_task(small_tasks.section(name, tmp_path), seed=42)
    pieces = []

    def forward(inputs):  # logits that depend on the input in a lively way
        pieces.append(len(inputs))
        token = inputs.unsqueeze(-1) if task.inputs_name == "input_ids" else inputs.mean(dim=(1, 2, 3)).unsqueeze(-1)
        return torch.cos(token.double() * torch.arange(1, 257))

    figures = evaluate(task, forward, 41, at_once=8)
    items = figures["evaluated_sequences"]
    assert items == min(41, task.evaluation_items or 10**9)
    assert max(pieces) <= 8
    batch = task.batch(EVALUATION, 0, items)
    logits = forward(batch.inputs)
    assert figures["loss"] == pytest.approx(task.loss(logits, batch.targets).item(), rel=1e-10)
    assert figures["accuracy"] == pytest.approx(task.accuracy(logits, batch.targets).item(), rel=1e-6)  # float32
    assert figures.get("perplexity") == (math.exp(figures["loss"]) if isinstance(task, NextToken) else None)


@pytest.mark.parametrize(("value", "loss"), [(math.nan, None), (1e5, 1e5)])
def test_a_loss_without_a_perplexity_is_said_so(tmp_path, value, loss):
    class Hopeless(NextToken):
        evaluation_items = None
        batch = build_task(small_tasks.section("text", tmp_path), seed=0).batch

        def loss(self, logits, targets):
            return torch.tensor(value)

    figures = evaluate(Hopeless(), lambda inputs: torch.zeros(*inputs.shape, 3), 8, at_once=8)
    assert (figures["loss"], figures["perplexity"]) == (loss, None)


def parsed(task: dict, **arguments):
    model = {"factory": "training.models.gpt:GPT", "arguments": {"vocabulary": 256, "length": 64} | arguments}
    return parse_config({"run_id": "a", "output": "b", "model": model, "task": task}, "run.yaml").task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"name": "synthetic_ml"},
            "one of associative_recall, images, synthetic_lm, text, got 'synthetic_ml'; did you mean 'synthetic_lm'?",
        ),
        ({"name": "text"}, "the key 'task.path' is missing"),
        ({"name": "text", "path": "a", "sufix": ".md"}, "unknown key 'task.sufix'; did you mean 'task.suffix'?"),
        ({"name": "text", "path": "a", "held_out": 1}, "task.held_out cannot be 1: it should be less than 1"),
        ({"name": "text", "path": "a", "length": 65}, "task.length = 65 is more than the model's 64"),
        ({"name": "images", "data": "cifar"}, "task.data cannot be 'cifar': it should be 'cifar10', 'fashion_mnist'"),
        ({"name": "images", "data": "cifar10"}, "task.path is missing: the folder that holds the images of task.data"),
        ({"name": "images", "data": "digits", "channels": 2}, "task.channels cannot be 2: it should be 1 or 3"),
    ],
)
def test_a_mistake_in_a_task_is_one_sentence(task, message):
    with pytest.raises(ConfigError, match=r"^run\.yaml: ") as caught:
        parsed(task)
    assert message in str(caught.value)


def test_a_task_takes_what_the_model_says_already():
    assert parsed({"name": "synthetic_lm"}) == SyntheticLM(vocabulary=256, length=64)
    images = parsed({"name": "images", "data": "digits"}, image=8, channels=1, classes=10, patch=2)
    assert images == Images(data="digits", image=8, channels=1, classes=10)


@pytest.mark.parametrize("name", [name for name in small_tasks.NAMES if name != "associative_recall"])
def test_a_run_that_was_interrupted_goes_on_with_the_same_batches(configure, tmp_path, name):
    """As `test_resume` has it for associative recall: the weights after eight steps are the same to the bit."""
    model = {
        "factory": "training.models.gpt:GPT",
        "arguments": {"vocabulary": 256, "length": 16, "width": 8, "depth": 1},
    }
    if name in ("images", "augmented"):
        sizes = {"image": 12 if name == "augmented" else 8, "patch": 4, "width": 8, "depth": 1, "heads": 1}
        model = {"factory": "training.models.vit:ViT", "arguments": {"channels": 1, "classes": 10, **sizes}}
    task = small_tasks.section(name, tmp_path).model_dump() | {"batch": 8}
    sections = {"model": model, "task": task, "steps": 8, "checkpoint": {"every": 4}}
    whole, parts = (configure(output, **sections) for output in ("whole", "parts"))
    train(whole, ALONE)
    train(parts, ALONE, until=4)
    train(parts, ALONE, resume=True)
    left, right = (
        load_file(Path(run.output) / "checkpoints/step-00000008/model.safetensors") for run in (whole, parts)
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
