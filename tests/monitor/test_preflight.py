"""One look at a model: what is profiled, decided and warned of, and that the model stays as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rksp_core.errors import MemoryLimitError, ModelError, NoBlocksError, NotFiniteError, ProbeError
from rksp_core.profile import ModelProfile
from rksp_monitor.baselines import next_token_loss
from rksp_monitor.commands.preflight import _loss
from rksp_monitor.models import LoadedModel, load_model
from rksp_monitor.preflight import PreflightReport, Settings, has_normalization, preflight
from rksp_monitor.probe import Probe, default_probe, random_probe


def factory(name: str, **arguments: object) -> LoadedModel:
    return load_model(f"tests.monitor.factories:{name}", arguments=arguments)


def look(model: LoadedModel, probe: Probe | None = None, **settings: object) -> PreflightReport:
    return preflight(model, probe or random_probe(32), Settings(**settings))


def test_every_block_is_in_the_report_in_depth_order() -> None:
    report = look(factory("tiny", depth=4))
    assert [layer.layer for layer in report.profile.layers] == [f"blocks.{i}" for i in range(4)]
    assert report.profile.probe["sha256"] == random_probe(32).sha256
    assert report.decision.verdict in ("proceed", "monitor", "use_kss")


def test_a_preflight_document_is_a_profile_too() -> None:
    report = look(factory("tiny"))
    assert ModelProfile.from_dict(report.to_dict()) == report.profile


def test_the_same_seed_gives_the_same_document() -> None:
    first, again = (look(factory("tiny"), learning_rate=1e-3).to_dict() for _ in range(2))
    assert first == again


def test_the_model_and_the_random_state_are_as_before() -> None:
    model = factory("tiny")
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    state = torch.get_rng_state()
    look(model, learning_rate=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.module.training
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_the_probability_is_null_with_a_reason() -> None:
    risk = look(factory("tiny")).to_dict()["risk"]
    assert risk["divergence_probability"] is None
    assert risk["reason"]
    assert risk["baselines"]["calibrated"] is False


class TestBaselines:
    """Learning rate x depth, and the look-ahead."""

    def test_without_a_rate_there_is_no_look_ahead(self) -> None:
        baselines = look(factory("tiny")).baselines
        assert baselines["learning_rate_times_depth"] is None
        assert baselines["look_ahead"]["available"] is False
        assert "--lr" in baselines["look_ahead"]["reason"]

    def test_the_rate_times_the_blocks_found_or_given(self) -> None:
        assert look(factory("tiny"), learning_rate=0.01).baselines["learning_rate_times_depth"] == pytest.approx(0.03)
        given = look(factory("tiny"), learning_rate=0.01, depth=12).baselines
        assert given["learning_rate_times_depth"] == pytest.approx(0.12)

    def test_the_look_ahead_learns_the_probe_at_a_usual_rate(self) -> None:
        ahead = look(factory("tiny"), learning_rate=1e-2, steps=8).baselines["look_ahead"]
        assert ahead["finite"]
        assert len(ahead["losses"]) == 8
        assert ahead["losses"][-1] < ahead["losses"][0]
        assert ahead["summary_after"]["near_unit_mass"]["mean"] is not None

    def test_a_rate_that_blows_up_is_seen(self) -> None:
        report = look(factory("no_norm"), learning_rate=30.0)
        assert report.baselines["look_ahead"]["largest_loss"] is None or (
            report.baselines["look_ahead"]["largest_loss"] > 50
        )
        assert report.decision.verdict == "use_kss"
        assert any("look-ahead" in reason for reason in report.decision.reasons)

    def test_a_model_without_logits_says_unavailable(self) -> None:
        report = look(factory("hidden"), Probe({"inputs": torch.randn(8, 32, 16)}, "test"), learning_rate=1e-3)
        assert report.baselines["look_ahead"]["available"] is False
        assert any("--loss module:function" in warning for warning in report.warnings)

    def test_a_loss_of_ones_own(self) -> None:
        loss = _loss("tests.monitor.factories:energy")
        probe = Probe({"inputs": torch.randn(8, 32, 16)}, "test")
        assert look(factory("hidden"), probe, learning_rate=1e-3, loss=loss).baselines["look_ahead"]["available"]

    def test_a_loss_that_raises_is_one_sentence(self) -> None:
        loss = _loss("tests.monitor.factories:broken_loss")
        with pytest.raises(ModelError, match=r"the loss .*broken_loss raised KeyError: 'labels' \(factories.py"):
            look(factory("tiny"), learning_rate=1e-3, loss=loss)

    def test_an_optimizer_without_a_standard_rate_says_so(self) -> None:
        report = look(factory("tiny"), learning_rate=1.0, optimizer="sgd")
        assert any("--standard-lr" in warning for warning in report.warnings)
        assert not any("times the standard" in reason for reason in report.decision.reasons)


def test_next_token_loss_does_not_count_padding() -> None:
    logits, tokens = torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    by_hand = [-logits[0, t].log_softmax(-1)[tokens[0, t + 1]] for t in range(5)]
    by_hand += [-logits[1, t].log_softmax(-1)[tokens[1, t + 1]] for t in range(2)]
    loss = next_token_loss(logits, {"input_ids": tokens, "attention_mask": mask})
    assert float(loss) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-6)  # float32 sums in another order


class TestFindings:
    """What the model is like becomes a verdict or a warning, not an error."""

    def test_norms_are_recognized_by_what_they_are(self) -> None:
        assert has_normalization(factory("tiny").module.blocks)
        assert not has_normalization(factory("no_norm").module.blocks)
        assert has_normalization([torch.nn.Sequential(torch.nn.RMSNorm(4))])
        assert not has_normalization([torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))])

    def test_no_norm_asks_for_kss(self) -> None:
        report = look(factory("no_norm"))
        assert report.decision.verdict == "use_kss"
        assert any("no normalization" in reason for reason in report.decision.reasons)

    def test_zero_branches_are_inconclusive(self) -> None:
        report = look(factory("zero_branches"))
        assert report.decision.verdict == "inconclusive"
        assert "not informative yet" in report.decision.reasons[0]
        assert any("degenerate_update" in warning for warning in report.warnings)

    def test_random_tokens_by_default_are_mentioned(self) -> None:
        assert any("no --probe was given" in w for w in look(factory("tiny"), default_probe(32, 64, 0)).warnings)
        assert not any("no --probe" in w for w in look(factory("tiny"), random_probe(32)).warnings)

    def test_warnings_of_the_model_are_passed_on(self) -> None:
        model = dataclasses.replace(factory("tiny"), warnings=("half of it is random",))
        assert "half of it is random" in look(model).warnings

    def test_too_few_tokens_have_a_remedy(self) -> None:
        report = look(factory("tiny", width=64), random_probe(32, 2, 16))
        assert report.warnings
        assert all(layer.remedy for layer in report.profile.layers)


class TestErrors:
    """Each with one clear sentence."""

    def test_activations_that_are_not_finite_name_the_first_layer(self) -> None:
        with pytest.raises(NotFiniteError, match=r"first in blocks\.1 \(block 1 in depth order\)") as caught:
            look(factory("not_finite"))
        assert caught.value.exit_code == 3

    def test_no_blocks_lists_the_candidates(self) -> None:
        with pytest.raises(NoBlocksError):
            look(factory("flat"), Probe({"inputs": torch.randn(8, 4)}, "test"))
        with pytest.raises(NoBlocksError, match=r"blocks\.\*"):
            look(factory("tiny"), blocks="transformer.h.*")

    def test_the_probe_must_fit(self) -> None:
        with pytest.raises(ProbeError, match="takes 0 to 31"):
            look(factory("tiny"), random_probe(1000))

    def test_out_of_memory_says_what_to_lower(self) -> None:
        with pytest.raises(MemoryLimitError, match=r"out of memory on cpu; lower --micro-batch"):
            look(factory("exhausting"))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_profile() -> None:
    cpu = look(factory("tiny"))
    gpu = preflight(factory("tiny"), random_probe(32), Settings(), device="cuda")
    for ours, theirs in zip(cpu.profile.layers, gpu.profile.layers, strict=True):
        # float32 products are summed in another order on a GPU
        assert theirs.spectral_radius == pytest.approx(ours.spectral_radius, rel=1e-3)
