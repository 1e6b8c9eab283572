"""Batches, their hash, and the one place that decides about devices."""

from __future__ import annotations

import pytest
import torch

from rksp_core import batch as batches
from rksp_core import profile_model
from rksp_core.device import choose_device, parse_dtype
from rksp_core.errors import ConfigError, DeviceError

from .test_capture import Model, tokens


def test_the_hash_sees_names_shapes_dtypes_and_bytes_but_not_their_order() -> None:
    a, b = torch.arange(6).reshape(2, 3), torch.ones(2, 3)
    same = batches.batch_sha256({"a": a, "b": b})
    assert batches.batch_sha256({"b": b.clone(), "a": a.clone()}) == same
    for other in ({"a": a, "c": b}, {"a": a.T, "b": b}, {"a": a, "b": b.double()}, {"a": a + 1, "b": b}):
        assert batches.batch_sha256(other) != same
    assert batches.batch_sha256(a) == batches.batch_sha256({"input_ids": a})


def test_parts_of_a_batch() -> None:
    batch = {"ids": torch.arange(8).reshape(4, 2), "scale": torch.ones(3), "flag": True}
    part = batches.part(batch, 1, 3)
    assert part["ids"].tolist() == [[2, 3], [4, 5]]
    assert part["scale"].shape == (3,)
    assert part["flag"] is True
    assert batches.part(batch, 0, 4) is batch
    assert batches.sequences((torch.ones(5, 2), 3)) == 5
    with pytest.raises(ValueError, match="at least one dimension"):
        batches.sequences({"flag": True})


def test_padding_masks() -> None:
    mask = torch.tensor([[1, 1, 0]])
    expected = [[True, True, False]]
    assert batches.token_mask({"attention_mask": mask}).tolist() == expected
    assert batches.token_mask({"src_key_padding_mask": mask == 0}).tolist() == expected
    assert batches.token_mask(mask) is None


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_here_is_one_sentence(name: str) -> None:
    with pytest.raises(DeviceError, match=name.split(":")[0]):
        choose_device(name)


def test_devices_and_dtypes() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert parse_dtype("bf16") is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype must be one of float32"):
        parse_dtype("int8")


@pytest.mark.gpu
def test_cuda_gives_the_profile_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = Model(3)
    here = profile_model(model, tokens(16, 16))
    there = profile_model(model.cuda(), tokens(16, 16))
    for a, b in zip(here.layers, there.layers, strict=True):
        # float32 matrix products differ between the devices in their last bits, TF32 is off by default.
        assert a.spectral_radius == pytest.approx(b.spectral_radius, rel=1e-4)
        assert a.sigma_max == pytest.approx(b.sigma_max, rel=1e-4)
