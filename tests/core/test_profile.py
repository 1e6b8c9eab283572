"""The profile of a model: right on a real transformer, stored without loss, aggregated as documented."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rksp_core import LayerProfile, ModelProfile, Moments, ProfileWriter, profile_model
from rksp_core.errors import ProfileError
from rksp_core.profile import SUMMARY_FIELDS, ReliableMasses
from rksp_core.profiling import profile_layer
from rksp_core.wasserstein import modulus_quantiles

from .oracle import algorithm_1
from .planted import spectral_distance
from .test_capture import Model, tokens
from .test_dmd import FIGURES


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    torch.manual_seed(0)
    return profile_model(Model(4), tokens(16, 16), probe={"origin": "test"})


def test_a_real_transformer_agrees_with_algorithm_1() -> None:
    """Hidden states as the model itself hands them out, in plain NumPy, against hooks, moments and one eigensystem."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=48, n_layer=4, n_head=4, vocab_size=500, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 500, (16, 64), generator=torch.Generator().manual_seed(1))
    profile = profile_model(model, {"input_ids": ids}, samples=16 * 64)
    with torch.no_grad():
        states = model.transformer(ids, output_hidden_states=True).hidden_states
    # The last state carries the final LayerNorm already, so the last block cannot be read off here.
    for index, layer in enumerate(profile.layers[:-1]):
        X, Y = (states[i].flatten(0, 1).numpy().T for i in (index, index + 1))
        floor = 8 * 2.0**-50 * np.mean(X.astype(np.float64) ** 2)
        oracle = algorithm_1(X, Y, floor=floor)
        assert layer.status == ("ok",)
        assert layer.rank == len(oracle["eigenvalues"]) == 48
        for name in FIGURES:
            assert getattr(layer, name) == pytest.approx(oracle[name], rel=1e-9), name
        assert layer.reliable.modes == oracle["reliable_modes"]
        assert spectral_distance(layer.eigenvalues, oracle["eigenvalues"]) < 1e-9


def test_summary_over_layers_and_depth_thirds(profile: ModelProfile) -> None:
    column = [layer.spectral_radius for layer in profile.layers]
    summary = profile.summary["spectral_radius"]
    assert summary["mean"] == pytest.approx(np.mean(column))
    assert summary["std"] == pytest.approx(np.std(column))
    assert (summary["min"], summary["max"]) == (min(column), max(column))
    # array_split of four layers: two, one, one
    assert summary["early"] == pytest.approx(np.mean(column[:2]))
    assert (summary["middle"], summary["late"]) == (column[2], column[3])
    assert set(profile.summary) == set(SUMMARY_FIELDS)


def test_a_value_that_is_not_known_is_left_out_of_the_summary(profile: ModelProfile) -> None:
    first = dataclasses.replace(profile.layers[0], spectral_radius=None)
    summary = dataclasses.replace(profile, layers=(first, *profile.layers[1:])).summary["spectral_radius"]
    assert summary["mean"] == pytest.approx(np.mean([layer.spectral_radius for layer in profile.layers[1:]]))
    unknown = dataclasses.replace(profile, layers=(first,)).summary["spectral_radius"]
    assert set(unknown.values()) == {None}


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_round_trip(profile: ModelProfile, tmp_path: Path, suffix: str) -> None:
    stamped = dataclasses.replace(profile, step=7, loss=1.5, gradient_norm=None, noise={"near_unit_mass_min": 0.01})
    stamped.save(tmp_path / f"profile.{suffix}")
    assert ModelProfile.load(tmp_path / f"profile.{suffix}") == stamped


def test_the_document_is_strict_json(profile: ModelProfile) -> None:
    text = json.dumps(profile.to_dict(), allow_nan=False)
    document = json.loads(text)
    assert document["schema"] == "rksp.profile/1"
    assert document["layers"][0]["kreiss_classical"] is None or document["layers"][0]["kreiss_classical"] >= 1
    assert len(document["probe"]["sha256"]) == 64
    assert document["probe"]["origin"] == "test"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "[" * 100_000, '{"schema": "rksp.profile/1"}', '{"schema": "rksp.profile/1", "layers": [{}]}'],
    ids=["empty", "a list", "no schema", "deep", "no layers", "no fields"],
)
def test_a_damaged_file_is_one_clear_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=r"profile\.json"):
        ModelProfile.load(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "no archive"])
def test_a_damaged_archive_is_one_clear_sentence(profile: ModelProfile, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "profile.npz"
    profile.save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:middle],
            "changed": whole[:100] + bytes([whole[100] ^ 255]) + whole[101:],
            "no archive": b"PK\3\4",
        }[damage]
    )
    with pytest.raises(ProfileError, match=r"profile\.npz"):
        ModelProfile.load(path)


def test_a_number_that_json_does_not_have_is_refused(profile: ModelProfile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    document = profile.to_dict() | {"step": 3, "loss": math.nan}
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=r"profile\.json cannot be read as a profile \(NaN is no number"):
        ModelProfile.load(path)


def test_the_quantiles_are_those_of_the_eigenvalues_and_are_always_stored(profile: ModelProfile) -> None:
    for layer, stored in zip(profile.layers, profile.to_dict(eigenvalues=False)["layers"], strict=True):
        assert layer.modulus_quantiles == modulus_quantiles(layer.eigenvalues)
        assert stored["modulus_quantiles"] == list(layer.modulus_quantiles)
        assert stored["modulus_quantiles"][-1] <= layer.spectral_radius * (1 + 1e-5)


def test_a_profile_of_before_quantiles_and_noise_is_read(profile: ModelProfile) -> None:
    document = profile.to_dict()
    for layer in document["layers"]:
        del layer["modulus_quantiles"]
    read = ModelProfile.from_dict(document)
    assert [layer.modulus_quantiles for layer in read.layers] == [None] * 4
    assert read.noise == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modulus_quantiles": [1.0] * 31}, "modulus_quantiles must be 32 numbers or null"),
        ({"modulus_quantiles": [1.0] * 31 + ["a"]}, "modulus_quantiles must be a number, got 'a'"),
        ({"modulus_quantiles": "x" * 32}, "modulus_quantiles must be 32 numbers or null"),
    ],
)
def test_quantiles_that_are_none_are_one_clear_sentence(profile: ModelProfile, change: dict, message: str) -> None:
    document = profile.to_dict()
    document["layers"][0] |= change
    with pytest.raises(ProfileError, match=message):
        ModelProfile.from_dict(document)


@pytest.mark.parametrize("noise", [{"loss": "a"}, {"loss": None}, [1.0], 3])
def test_noise_that_is_none_is_one_clear_sentence(profile: ModelProfile, noise: object) -> None:
    with pytest.raises(ProfileError, match="the profile document is damaged"):
        ModelProfile.from_dict(profile.to_dict() | {"noise": noise})


@pytest.mark.parametrize(
    ("field", "value"), [("near_unit_mass", "a"), ("rank", None), ("kreiss_constant", [1.0]), ("width", True)]
)
def test_a_figure_that_is_no_number_is_one_clear_sentence(profile: ModelProfile, field: str, value: object) -> None:
    document = profile.to_dict()
    document["layers"][0][field] = value
    with pytest.raises(ProfileError, match=f"{field} must be a number"):
        ModelProfile.from_dict(document)


def test_a_profile_without_layers_is_refused(profile: ModelProfile) -> None:
    with pytest.raises(ProfileError, match="no layers"):
        ModelProfile.from_dict(profile.to_dict() | {"layers": []})


def test_a_missing_file_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"absent\.npz cannot be read"):
        ModelProfile.load(tmp_path / "absent.npz")


def test_an_executor_changes_nothing_and_progress_is_told() -> None:
    torch.manual_seed(0)
    model, seen = Model(4), []
    with ThreadPoolExecutor(2) as pool:
        spread = profile_model(model, tokens(), executor=pool, progress=lambda *call: seen.append(call))
    assert spread.to_dict() == profile_model(model, tokens()).to_dict()
    assert seen == [(i + 1, 4, f"layers.{i}") for i in range(4)]


def test_the_same_inputs_give_the_same_profile(profile: ModelProfile) -> None:
    torch.manual_seed(0)
    assert profile_model(Model(4), tokens(16, 16), probe={"origin": "test"}) == profile


def test_an_exploding_layer_is_a_finding() -> None:
    torch.manual_seed(0)
    model = Model(3)
    with torch.no_grad():
        model.layers[1].linear.bias[0] = float("nan")
    profile = profile_model(model, tokens())
    assert [layer.status for layer in profile.layers] == [("ok",), ("not_finite",), ("not_finite",)]
    assert profile.layers[1].near_unit_mass is None
    assert "learning rate" in profile.layers[1].remedy
    json.dumps(profile.to_dict(), allow_nan=False)


def test_a_constant_beyond_float64_is_null() -> None:
    """Signed unit vectors span exactly, so A is exactly nilpotent: K_theta is about 1000^29 and not within reach."""
    x = torch.cat([torch.eye(64), -torch.eye(64)]).double().repeat(4, 1)
    y = 1000 * x.roll(1, 1)
    y[:, 0] = 0
    moments = Moments(64)
    moments.update(x, y)
    layer = profile_layer("shift", moments, depth=4)
    assert (layer.spectral_radius, layer.kreiss_constant) == (0.0, None)
    assert layer.transient_growth == pytest.approx(1e12, rel=1e-6)
    json.dumps(layer.to_dict(), allow_nan=False)


def test_bfloat16_and_float16_models_are_profiled() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        profile = profile_model(Model(2).to(dtype), tokens(16, 16))
        assert profile.settings["dtype"] == str(dtype).removeprefix("torch.")
        assert all(layer.spectral_radius is not None for layer in profile.layers)


def test_profile_writer_stamps_and_numbers_its_files(profile: ModelProfile, tmp_path: Path) -> None:
    writer = ProfileWriter(tmp_path, every=10)
    assert [step for step in range(25) if writer.due(step)] == [0, 10, 20]
    path = writer.write(profile, 10, loss=2.0, gradient_norm=float("inf"))
    assert path == tmp_path / "profiles" / "step-00000010.json"
    stored = ModelProfile.load(path)
    assert (stored.step, stored.loss, stored.gradient_norm) == (10, 2.0, None)
    assert stored.layers[0].eigenvalues is None
    assert stored.not_finite == ("gradient_norm",), "not finite is another thing than not known"
    with_graph = torch.tensor(2.0, requires_grad=True)
    tensors = ModelProfile.load(writer.write(profile, 20, loss=with_graph, gradient_norm=torch.tensor(0.5)))
    assert (tensors.loss, tensors.gradient_norm) == (2.0, 0.5), "a training loop holds tensors"
    assert not ProfileWriter(tmp_path / "other", every=0).due(0)
    assert not (tmp_path / "other").exists()


def test_fields_of_a_later_version_are_ignored() -> None:
    layer = LayerProfile("block", 4, 4, 10, 10, reliable=ReliableMasses(0))
    assert LayerProfile.from_dict(layer.to_dict() | {"new_field": 1}) == layer
