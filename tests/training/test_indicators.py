"""Each indicator against a plain second computation, in float64, on a run of the trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.experiments.indicators import INDICATORS, Before, indicators
from training.ranks import Ranks
from training.run import Run, build_run
from training.step import advance
from training.tasks import PROBE, TRAINING

ALONE = Ranks(0, 1, torch.device("cpu"))
RATE, DECAY = 0.01, 0.1
ADAMW = {"name": "adamw", "learning_rate": RATE, "weight_decay": DECAY, "betas": [0.8, 0.9], "epsilon": 1e-8}


@pytest.fixture
def build(configure: Any) -> Callable[..., Run]:
    def make(optimizer: dict[str, Any] = ADAMW, **sections: Any) -> Run:
        config = configure(optimizer=optimizer, precision="float64", schedule={"warmup": 0}, **sections)
        return build_run(config, ALONE)

    return make


def measured(run: Run, steps: int) -> tuple[dict[str, float], Run]:
    """The indicators after so many steps, and the run as it was before the last."""
    for _ in range(steps - 1):
        advance(run)
    earlier, before = copy.deepcopy(run), Before(run)
    advance(run)
    return indicators(run, run.task.batch(PROBE, 0, 8), before), earlier


def gradients(run: Run, step: int) -> dict[str, Tensor]:
    """The gradient of a step's batch at the weights that the run has now."""
    inputs, targets = run.task.batch(TRAINING, step, run.config.task.batch)
    loss = run.task.loss(run.model(inputs), targets)
    names, parameters = zip(*run.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_update_ratio_is_that_of_adamw_by_hand(build: Callable[..., Run]) -> None:
    """The first step moves every entry by rate x g / (|g| + eps), and shrinks matrices by rate x decay before."""
    found, earlier = measured(build(), steps=1)
    ratios = []
    for name, gradient in gradients(earlier, 1).items():
        weight = earlier.model.get_parameter(name).detach()
        if weight.dim() >= 2:
            update = -RATE * DECAY * weight - RATE * gradient / (gradient.abs() + 1e-8)
            ratios.append(float(update.norm() / weight.norm()))
    assert found["update_ratio_max"] == pytest.approx(max(ratios), rel=1e-8)  # a difference of weights: rounding
    assert found["update_ratio_median"] == pytest.approx(float(np.median(ratios)), rel=1e-8)


def test_surprise_is_the_gradient_by_the_second_moments_before_it(build: Callable[..., Run]) -> None:
    run = build()
    twin = copy.deepcopy(run)
    moments = {name: torch.zeros_like(parameter) for name, parameter in twin.model.named_parameters()}
    momenta = copy.deepcopy(moments)
    for step in (1, 2, 3):
        for name, gradient in gradients(twin, step).items():
            moments[name] = 0.9 * moments[name] + 0.1 * gradient**2
            momenta[name] = 0.8 * momenta[name] + 0.2 * gradient
        advance(twin)
    found, _ = measured(run, steps=4)
    last = gradients(twin, 4)
    v_hat = {name: moment / (1 - 0.9**3) for name, moment in moments.items()}
    inside = [name for name in last if name.startswith("blocks.")]
    surprise = torch.cat([(last[name].abs() / (v_hat[name].sqrt() + 1e-8)).flatten() for name in inside])
    assert found["surprise_rms"] == pytest.approx(float(surprise.square().mean().sqrt()), rel=1e-10)
    assert found["surprise_max"] == pytest.approx(float(surprise.max()), rel=1e-10)
    sizes = np.sort(np.concatenate([value.numpy().ravel() for value in v_hat.values()]))[::-1]
    top = sizes[: len(sizes) // 100].sum() / sizes.sum()
    assert found["second_moment_top_share"] == pytest.approx(top, rel=1e-10)
    one, other = (np.concatenate([each[name].numpy().ravel() for name in last]) for each in (last, momenta))
    assert found["momentum_cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_the_momentum_of_lion_and_sgd_counts_too(build: Callable[..., Run]) -> None:
    """After one step it is the first gradient, up to a factor, so the cosine is that of the first two gradients."""
    for optimizer in ({"name": "lion"}, {"name": "sgd"}):
        run = build({**optimizer, "learning_rate": 1e-3})
        first = gradients(run, 1)
        found, earlier = measured(run, steps=2)
        one, other = (torch.cat([g.flatten() for g in each.values()]) for each in (first, gradients(earlier, 2)))
        assert found["momentum_cosine"] == pytest.approx(float(functional.cosine_similarity(one, other, dim=0)))
        assert "surprise_rms" not in found


def test_equal_scores_give_the_entropy_of_a_uniform_past(build: Callable[..., Run]) -> None:
    """Query t looks at t tokens, so the mean entropy over T queries is that of ln t."""
    run = build()
    for block in run.model.blocks:
        torch.nn.init.zeros_(block.attention.query.weight)
        torch.nn.init.zeros_(block.attention.query.bias)
    found = indicators(run, run.task.batch(PROBE, 0, 4), None)
    expected = np.mean(np.log(np.arange(1, 17)))
    assert found["attention_entropy_min"] == pytest.approx(expected, rel=1e-10)
    assert found["attention_entropy_mean"] == pytest.approx(expected, rel=1e-10)
    assert found["attention_logit_max"] == 0.0


def test_attention_is_that_of_plain_loops(build: Callable[..., Run]) -> None:
    run = build(arguments={"depth": 1, "length": 6, "norm": "no_norm"}, task={"batch": 8, "pairs": 2})
    attention, probe = run.model.blocks[0].attention, run.task.batch(PROBE, 0, 3)
    for layer in (attention.query, attention.key):
        layer.weight.data.mul_(1e3)  # away from the uniform
    x = (run.model.token(probe.inputs) + run.model.position.weight).detach()  # (B, T, d): no norm before attention
    query, key = (layer(x).detach().numpy() for layer in (attention.query, attention.key))
    entropies, largest = np.zeros((2, 3, 6)), 0.0
    for head, half in enumerate((slice(0, 8), slice(8, 16))):
        for item in range(3):
            for t in range(6):
                scores = np.array([query[item, t, half] @ key[item, s, half] / math.sqrt(8) for s in range(t + 1)])
                weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                entropies[head, item, t] = -(weights * np.log(weights)).sum()
                largest = max(largest, np.abs(scores).max())
    found = indicators(run, probe, None)
    heads = entropies.mean(axis=(1, 2))
    assert found["attention_entropy_min"] == pytest.approx(heads.min(), rel=1e-10)
    assert found["attention_entropy_mean"] == pytest.approx(heads.mean(), rel=1e-10)
    assert found["attention_logit_max"] == pytest.approx(largest, rel=1e-10)
    assert heads.min() < 0.8 * np.mean(np.log(np.arange(1, 7)))


def test_hidden_states_are_those_of_the_first_and_the_last_block(build: Callable[..., Run]) -> None:
    run = build(arguments={"depth": 3})
    probe = run.task.batch(PROBE, 0, 4)
    x = run.model.token(probe.inputs) + run.model.position.weight
    sizes = []
    for block in run.model.blocks:
        x = block(x)
        sizes.append(float(x.detach().square().mean().sqrt()))
    found = indicators(run, probe, None)
    assert found["hidden_rms_first"] == pytest.approx(sizes[0], rel=1e-10)
    assert found["hidden_rms_last"] == pytest.approx(sizes[2], rel=1e-10)
    assert found["hidden_rms_ratio"] == pytest.approx(sizes[2] / sizes[0], rel=1e-10)


def test_weight_norms_are_the_largest_singular_values(build: Callable[..., Run]) -> None:
    found, _ = measured(run := build(), steps=3)
    norms = {name: float(torch.linalg.svdvals(w)[0]) for name, w in run.model.state_dict().items() if w.dim() == 2}
    assert found["weight_norm_max"] == pytest.approx(max(n for k, n in norms.items() if k.startswith("blocks.")))
    assert found["weight_norm_head"] == pytest.approx(norms["head.weight"])


@pytest.mark.parametrize("k", [1, 3])
def test_the_losses_of_the_probe_are_those_of_the_asked_positions(build: Callable[..., Run], k: int) -> None:
    run = build(task={"name": "associative_recall", "batch": 8, "pairs": 3, "queries": k})
    probe = run.task.batch(PROBE, 0, 50)
    logits = run.model(probe.inputs).detach()
    chances = np.exp(logits[:, -k:].numpy())
    chances /= chances.sum(axis=2, keepdims=True)
    losses = -np.log(np.take_along_axis(chances, probe.targets.numpy()[:, :, None], axis=2)).ravel()
    found = indicators(run, probe, None)
    assert found["probe_loss"] == pytest.approx(losses.mean(), rel=1e-10)
    assert found["probe_loss"] == pytest.approx(float(run.task.loss(logits, probe.targets)), rel=1e-10)
    assert found["probe_loss_tail"] == pytest.approx(np.quantile(losses, 0.99) / losses.mean(), rel=1e-10)


def test_the_losses_of_a_text_leave_out_what_is_not_asked(build: Callable[..., Run]) -> None:
    sizes = {"training_sequences": 20, "validation_sequences": 10}
    run = build(task={"name": "synthetic_lm", "batch": 8, **sizes})
    probe = run.task.batch(PROBE, 0, 8)
    found = indicators(run, probe, None)
    logits = run.model(probe.inputs).detach()
    assert found["probe_loss"] == pytest.approx(float(run.task.loss(logits, probe.targets)), rel=1e-10)
    assert found["logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-10)
    assert found["logit_rms"] == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-10)


def test_every_name_is_measured_and_no_other(build: Callable[..., Run]) -> None:
    found, _ = measured(build(), steps=2)
    assert sorted(found) == sorted(INDICATORS)


def test_images_have_no_head_and_look_at_everything(build: Callable[..., Run]) -> None:
    """A ViT's attention is not causal, so equal scores give ln of all its patches; its logits are (B, classes)."""
    arguments = {"image": 8, "channels": 1, "classes": 10, "patch": 4, "width": 16, "depth": 2, "heads": 2}
    run = build(
        model={"factory": "training.models.vit:ViT", "arguments": arguments},
        task={"name": "images", "data": "digits", "batch": 8},
    )
    for block in run.model.blocks:
        torch.nn.init.zeros_(block.attention.query.weight)
        torch.nn.init.zeros_(block.attention.query.bias)
    probe = run.task.batch(PROBE, 0, 8)
    found = indicators(run, probe, None)
    assert found["attention_entropy_min"] == pytest.approx(math.log(4 + 1), rel=1e-10)  # the class token too
    logits = run.model(run.to_model(probe.inputs)).detach()
    assert found["probe_loss"] == pytest.approx(float(functional.cross_entropy(logits, probe.targets)), rel=1e-10)
