"""Names, shapes and kinds of numbers: what of a checkpoint goes where in the model, or why it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from rksp_core.errors import CorruptCheckpoint
from rksp_monitor.checkpoints.lazy import Described, LazyTensors
from rksp_monitor.weights import load_into
from tests.monitor import tiny_model

WEIGHTS = tiny_model.weights(7)


def wrapped() -> nn.Module:
    """Each block and the whole are wrapped, as training loops do it."""
    model = tiny_model.build()
    for at, block in enumerate(model.blocks):
        model.blocks[at] = torch.compile(checkpoint_wrapper(block), backend="eager")
    return nn.DataParallel(model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def holds(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_wrappers_in_the_middle_of_names_are_taken_out():
    saved = wrapped().state_dict()
    assert any("blocks.0._orig_mod." in name for name in saved)
    model = tiny_model.build()
    load_into(model, saved, "x")
    assert holds(model, {"blocks.2.up.weight": saved["module.blocks.2._orig_mod.up.weight"]})


def test_wrappers_of_the_model_itself_are_taken_out():
    model = wrapped()
    load_into(model, WEIGHTS, "x")
    assert torch.equal(model.module.embedding.weight, WEIGHTS["embedding.weight"])


@pytest.mark.parametrize("prefix", ["net.", "model.", "student.backbone.", "_orig_mod.model.module."])
def test_the_model_is_found_under_any_prefix(prefix: str):
    model = tiny_model.build()
    load_into(model, {**{prefix + name: value for name, value in WEIGHTS.items()}, "judge.weight": torch.ones(2)}, "x")
    assert holds(model, WEIGHTS)


@pytest.mark.parametrize("first", ["", "model."])
def test_averaged_weights_beside_the_model_are_left(first: str):
    copies = {first: WEIGHTS, "average.": tiny_model.weights(8)}
    model = tiny_model.build()
    found = {prefix + name: value for prefix, weights in copies.items() for name, value in weights.items()}
    if first:
        load_into(model, found, "x")
        assert holds(model, WEIGHTS)
    else:  # at the top nothing tells what belongs to the model
        with pytest.raises(CorruptCheckpoint, match=r"unexpected average\.embedding\.weight"):
            load_into(model, found, "x")


def test_two_copies_of_the_model_are_not_guessed_between():
    found = {prefix + name: value for prefix in ("teacher.", "student.") for name, value in WEIGHTS.items()}
    with pytest.raises(CorruptCheckpoint, match=r"holds the model 2 times, under student\., teacher\."):
        load_into(tiny_model.build(), found, "x")


def test_buffers_that_the_model_does_not_store_are_left():
    model = tiny_model.build()
    model.register_buffer("mask", torch.ones(4), persistent=False)
    load_into(model, {**WEIGHTS, "mask": torch.zeros(4)}, "x")
    assert model.mask.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64, torch.bool])
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype):
    model = tiny_model.build()
    before = state(model)
    found = {**WEIGHTS, "embedding.weight": WEIGHTS["embedding.weight"].to(dtype)}
    says = f"numbers: embedding.weight is {str(dtype)[6:]}, expected float32"
    with pytest.raises(CorruptCheckpoint, match=says):
        load_into(model, found, "x")
    assert holds(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_are_converted(dtype: torch.dtype):
    model = tiny_model.build()
    load_into(model, {name: value.to(dtype) for name, value in WEIGHTS.items()}, "x")
    assert holds(model, {name: value.to(dtype).float() for name, value in WEIGHTS.items()})


def test_many_names_are_counted_and_a_line_stays_a_line():
    found = {f"extra\n{n}": torch.ones(1) for n in range(10)} | WEIGHTS
    with pytest.raises(CorruptCheckpoint, match=r"unexpected extra\\n0, extra\\n1, extra\\n2 and 7 more") as caught:
        load_into(tiny_model.build(), found, "step-1\n")
    assert "\n" not in str(caught.value)


def test_nothing_is_read_of_a_checkpoint_that_does_not_fit():
    described = {name: Described(tuple(value.shape), "float32") for name, value in WEIGHTS.items()}
    described["embedding.weight"] = Described((2**40, 2**20), "float32")
    reads: list[str] = []
    with pytest.raises(
        CorruptCheckpoint, match=r"embedding\.weight is \(1099511627776, 1048576\), expected \(32, 16\)"
    ):
        load_into(tiny_model.build(), LazyTensors(described, lambda name: reads.append(name) or WEIGHTS[name]), "x")
    assert not reads
