"""The documents of `rksp profile` and `rksp compare` follow their published schemas; one profile looks alike in all."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import torch

from rksp_core.compare import FIELDS, compare
from rksp_core.noise import profile_noise
from rksp_core.profile import ModelProfile
from rksp_core.profiling import profile_model
from rksp_core.wasserstein import QUANTILES
from tests.core.test_capture import Model, tokens


def schema(name: str) -> dict[str, Any]:
    return json.loads((files("rksp_monitor") / "schemas" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured() -> ModelProfile:
    torch.manual_seed(0)
    model = Model(3)
    noise = profile_noise(model, tokens(), groups=2)
    return dataclasses.replace(profile_model(model, tokens()), noise=noise, step=7, loss=2.0, not_finite=("loss",))


@pytest.fixture(scope="module")
def broken() -> ModelProfile:
    """A layer that is not finite, and nothing that a trainer would add."""
    torch.manual_seed(0)
    model = Model(3)
    with torch.no_grad():
        model.layers[1].linear.bias[0] = float("nan")
    return profile_model(model, tokens())


def check(document: dict[str, Any], name: str) -> None:
    published = schema(name)
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), published)


@pytest.mark.parametrize("eigenvalues", [True, False])
def test_a_profile_follows_its_schema(measured: ModelProfile, broken: ModelProfile, eigenvalues: bool):
    for each in (measured, broken):
        check(each.to_dict(eigenvalues=eigenvalues), "profile")


def test_a_comparison_follows_its_schema(measured: ModelProfile, broken: ModelProfile):
    for before, after in ((measured, measured), (measured, broken), (broken, measured)):
        check(compare(before, after).to_dict(), "compare")


def test_every_field_of_a_document_is_described(measured: ModelProfile):
    document = measured.to_dict()
    assert set(document) == set(schema("profile")["properties"])
    assert set(document["layers"][0]) == set(schema("profile")["$defs"]["layer"]["properties"])
    document = compare(measured, measured).to_dict()
    described = schema("compare")
    assert set(document) == set(described["properties"])
    beside = described["$defs"]["compared"]["allOf"][1]["properties"]
    assert set(document["layers"][0]) == set(described["$defs"]["layer"]["properties"]) - {"eigenvalues"} | set(beside)
    assert set(beside["change"]["properties"]) == set(FIELDS)


def test_a_layer_is_described_alike_everywhere():
    layers = [schema(name)["$defs"]["layer"] for name in ("preflight", "profile", "compare")]
    assert layers[0] == layers[1] == layers[2]
    assert layers[0]["properties"]["modulus_quantiles"]["maxItems"] == QUANTILES


@pytest.mark.parametrize("change", [{"schema": "rksp.profile/2"}, {"layers": []}, {"noise": {"loss": -1.0}}])
def test_another_document_is_refused(measured: ModelProfile, change: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(measured.to_dict() | change, schema("profile"))
