"""Stabilizers, optimizers and KSS in one run, as the paper combines them: they train, and they resume bitwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rksp_core.control import ControlWriter
from rksp_core.errors import ConfigError
from rksp_core.orders import KSSSettings, Reason
from training.build import build_model
from training.checkpoint import checkpoints
from training.loop import train
from training.run import build_run
from training.step import advance

from .test_resume import ALONE, assert_bitwise_equal, final

KSS = {"alpha": 0.15, "interval": 2, "layer_fraction": 0.5}
PENALTY = {"weight": 0.1, "interval": 3}

COMBINATIONS = {
    "kss-sam": {"kss": KSS, "stabilizers": {"sam": {"rho": 0.05}}},
    "lamb-warmup-kss": {"kss": KSS, "optimizer": {"name": "lamb"}, "schedule": {"warmup": 4}},
    "mup-kss": {"kss": KSS, "arguments": {"initialization": "mup", "base_width": 8}},
    "mup-lion-sam": {
        "arguments": {"initialization": "mup", "base_width": 8},
        "optimizer": {"name": "lion"},
        "stabilizers": {"sam": {}},
    },
    "surprise-clip-kss": {"kss": KSS, "stabilizers": {"surprise": 1.0, "clip": 1.0}},
    "spectral-clip-lion": {"optimizer": {"name": "lion"}, "stabilizers": {"spectral_norm": {}, "clip": 0.5}},
    "spectral-sam-checkpointing": {
        "activation_checkpointing": True,
        "stabilizers": {"spectral_norm": {}, "sam": {}, "jacobian": PENALTY},
    },
    "weight-norm-gradient-penalty-accumulation": {
        "accumulation": 2,
        "stabilizers": {"weight_norm": {}, "gradient_penalty": PENALTY},
    },
    "sgd-residual-l2-bfloat16": {
        "precision": "bfloat16",
        "optimizer": {"name": "sgd", "nesterov": True},
        "stabilizers": {"residual_l2": PENALTY, "jacobian": PENALTY},
    },
    "everything": {
        "kss": KSS,
        "accumulation": 2,
        "activation_checkpointing": True,
        "optimizer": {"name": "lamb"},
        "stabilizers": {
            "clip": 1.0,
            "sam": {},
            "weight_norm": {},
            "gradient_penalty": PENALTY,
            "residual_l2": PENALTY,
            "jacobian": PENALTY,
            "activation_variance": PENALTY,
        },
    },
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_trains_and_resumes_bitwise(configure, name):
    common = {"steps": 8, "checkpoint": {"every": 8}}
    whole, parts = (configure(output, **common, **COMBINATIONS[name]) for output in ("whole", "parts"))
    train(whole, ALONE)
    train(parts, ALONE, until=5)  # between two terms of each penalty
    assert train(parts, ALONE, resume=True)["status"] == "finished"
    assert_bitwise_equal(final(whole), final(parts))
    penalties = COMBINATIONS[name].get("stabilizers", {}).keys() & {"gradient_penalty", "residual_l2", "jacobian"}
    added = [record["auxiliary_loss"] > 0 for record in final(whole)[3]]
    assert added == [bool(penalties) and step % 3 == 0 for step in range(8)]


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_a_checkpoint_holds_the_weights_of_the_plain_model(configure, norm):
    config = configure(stabilizers={norm: {}}, steps=3)
    train(config, ALONE)
    newest = checkpoints(Path(config.output) / "checkpoints")[-1]
    plain = build_model(config.model, config.seed)
    plain.load_state_dict(load_file(newest / "model.safetensors"))
    run = build_run(config, ALONE)
    run.restore(newest)
    inputs = torch.arange(32).reshape(2, 16)
    assert torch.equal(plain.eval()(inputs), run.model.eval()(inputs))


def test_the_rate_of_each_group_is_the_rate_times_its_factor(configure):
    run = build_run(configure(arguments={"initialization": "mup", "base_width": 4}, schedule={"warmup": 0}), ALONE)
    record = advance(run)
    assert record.learning_rate == 1e-3
    assert {group["lr"] for group in run.optimizer.param_groups} == {1e-3, 0.25e-3}


def test_a_clipped_surprise_does_not_enter_the_moments(configure):
    """A penalty as heavy as a KSS term that goes wrong: without the limit it would move the weights as it likes."""
    sections = {"schedule": {"warmup": 0}, "metrics": {"kss_ratio_every": 0}}
    runs = [build_run(configure(stabilizers={"surprise": limit}, **sections), ALONE) for limit in (None, 1.0)]
    for run in runs:
        for _ in range(5):
            advance(run)
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_hook(lambda gradient: 1e4 * gradient)
        advance(run)
    moments = [max(float(state["exp_avg_sq"].max()) for state in run.optimizer.state.values()) for run in runs]
    assert moments[0] > 1e4 * moments[1]


def test_surprise_needs_adam(configure):
    with pytest.raises(ConfigError, match=r"stabilizers\.surprise needs the second moments of optimizer\.name: adamw"):
        configure(stabilizers={"surprise": 1.0}, optimizer={"name": "sgd"})


LIMITS = {"steps": 10, "schedule": {"warmup": 0}, "checkpoint": {"every": 5}}


@pytest.mark.parametrize(
    ("own", "ordered", "holds"), [(None, 0.5, 0.5), (0.7, 0.5, 0.5), (0.5, 0.7, 0.5), (0.5, None, 0.5)]
)
def test_the_tighter_limit_of_surprise_holds_an_orders_or_the_runs_own(configure, own, ordered, holds):
    one = configure("one", stabilizers={"surprise": own, "clip": 1.0}, **LIMITS)
    other = configure("other", stabilizers={"surprise": holds, "clip": 1.0}, **LIMITS)
    ControlWriter(one.control_folder).issue("small", KSSSettings(), Reason(), surprise=ordered)
    train(one, ALONE, until=7)  # and over a resume
    train(one, ALONE, resume=True)
    train(other, ALONE)
    weights = [load_file(checkpoints(Path(c.output) / "checkpoints")[-1] / "model.safetensors") for c in (one, other)]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    loose = configure("loose", stabilizers={"surprise": 0.7, "clip": 1.0}, **LIMITS)
    train(loose, ALONE)
    unlike = load_file(checkpoints(Path(loose.output) / "checkpoints")[-1] / "model.safetensors")
    assert any(not torch.equal(unlike[name], tensor) for name, tensor in weights[1].items())


@pytest.mark.parametrize("optimizer", ["lion", "sgd", "lamb"])
def test_an_order_of_surprise_is_rejected_without_adam_and_the_run_goes_on(configure, optimizer):
    config = configure(optimizer={"name": optimizer}, steps=4)
    writer = ControlWriter(config.control_folder)
    writer.issue("small", KSSSettings(alpha=0.2), Reason(), surprise=1.0)
    assert train(config, ALONE)["status"] == "finished"
    answer = writer.applied()
    assert (answer.status, answer.active.alpha, answer.active.surprise) == ("rejected", 0.0, None)
    assert answer.message.startswith(
        "the order asks for surprise 1.0, and surprise clipping needs the second moments of Adam, which"
    )


def test_a_trainer_may_bound_the_surprise_of_orders_or_allow_none(configure):
    for limits, says in (
        ([0.5, 2.0], "the order asks for surprise 0.1, this trainer allows 0.5 to 2 (limits.surprise)"),
        (None, "the order asks for surprise 0.1, this trainer has no such lever; its limits.surprise must allow it"),
    ):
        config = configure(f"limits-{limits}", steps=2, control={"limits": {"surprise": limits}})
        writer = ControlWriter(config.control_folder)
        writer.issue("small", KSSSettings(), Reason(), surprise=0.1)
        train(config, ALONE)
        assert (writer.applied().status, writer.applied().message) == ("rejected", says)
    with pytest.raises(ConfigError, match=r"control\.limits\.surprise must be \[least, most\]"):
        configure(control={"limits": {"surprise": [2.0, 1.0]}})


def test_lamb_warms_up(configure):
    """LAMB with warm-up (Table 14) is `optimizer.name: lamb` beside `schedule.warmup`."""
    config = configure(optimizer={"name": "lamb", "learning_rate": 0.02}, schedule={"warmup": 10}, steps=12)
    train(config, ALONE)
    records = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in records] == pytest.approx([0.002 * min(t, 10) for t in range(1, 13)])


def test_sam_steps_along_the_gradient_at_the_perturbed_weights(configure):
    """One step of the loop, against two steps by hand; SGD without momentum makes the update the gradient itself."""
    sections = {"precision": "float64", "optimizer": {"name": "sgd", "momentum": 0.0}, "schedule": {"warmup": 0}}
    run = build_run(configure(stabilizers={"sam": {"rho": 0.2}}, **sections), ALONE)
    by_hand = build_run(configure(**sections), ALONE)
    model, start = by_hand.model, [parameter.detach().clone() for parameter in by_hand.model.parameters()]
    batch = by_hand.task.batch(0, 1, 8)

    def gradient() -> list[torch.Tensor]:
        return list(torch.autograd.grad(by_hand.task.loss(model(batch.inputs), batch.targets), model.parameters()))

    first = gradient()
    norm = torch.cat([part.flatten() for part in first]).norm()
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), first, strict=True):
            parameter += 0.2 / norm * part
    second = gradient()
    advance(run)
    for parameter, before, part in zip(run.model.parameters(), start, second, strict=True):
        torch.testing.assert_close(parameter.detach(), before - 0.1 * part, rtol=1e-10, atol=1e-13)
