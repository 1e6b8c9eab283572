"""The look-ahead: as if the optimizer had run, on a copy, and nothing else moved."""

from __future__ import annotations

import copy

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn

from rksp_core.capture import uncompiled
from rksp_core.errors import ConfigError, ModelError
from rksp_core.lookahead import has_norm, look_ahead, make_optimizer
from rksp_core.profiling import profile_model

from .test_capture import Model, tokens


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        layer.dropout.p = 0.0
    return model


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("lion", lambda p: Lion(p, lr=0.01, betas=(0.9, 0.99))),
        (lambda m: make_optimizer("adamw", m, 0.01, 0.95), lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95))),
        (lambda m: make_optimizer("lion", m, 0.01, 0.95), lambda p: Lion(p, lr=0.01, betas=(0.9, 0.95))),
    ],
)
def test_takes_the_steps_that_the_optimizer_would(model: Model, name: object, optimizer: object) -> None:
    result = look_ahead(model, tokens(), loss, learning_rate=0.01, optimizer=name, steps=3)  # type: ignore[arg-type]
    twin = copy.deepcopy(model).train()
    stepper = optimizer(twin.parameters())  # type: ignore[operator]
    losses = []
    for _ in range(3):
        stepper.zero_grad()
        value = loss(twin(tokens()), tokens())
        value.backward()
        losses.append(value.item())
        stepper.step()
    assert result.losses == tuple(losses)
    assert result.steps == 3
    assert result.finite


def test_the_model_and_the_random_state_are_untouched(model: Model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = look_ahead(model, tokens(), loss, learning_rate=0.1, profile=lambda moved: profile_model(moved, tokens()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert result.profile is not None
    assert result.profile.layers[0].spectral_radius != profile_model(model, tokens()).layers[0].spectral_radius


def test_the_same_seed_gives_the_same_look_ahead() -> None:
    torch.manual_seed(0)
    model = Model()  # with dropout
    a, b = (look_ahead(model, tokens(), loss, learning_rate=0.1, seed=5) for _ in range(2))
    assert a == b
    assert a != look_ahead(model, tokens(), loss, learning_rate=0.1, seed=6)


def test_a_hopeless_rate_is_a_finding(model: Model) -> None:
    result = look_ahead(model, tokens(), loss, learning_rate=1e30, optimizer="sgd", steps=5)
    assert not result.finite
    assert result.profile is None
    assert result.steps < 5 or result.hidden_rms_after is None


def test_hidden_rms_is_that_of_the_last_block(model: Model) -> None:
    result = look_ahead(model, tokens(), loss, learning_rate=0.05, steps=1)
    model.train()
    h = model.embed(tokens())
    for layer in uncompiled(model).layers:
        h = layer(h)[0]
    assert result.hidden_rms_before == pytest.approx(h.double().square().mean().sqrt().item(), rel=1e-10)
    assert result.hidden_rms_after != result.hidden_rms_before


def test_hidden_rms_of_blocks_called_by_keyword() -> None:
    torch.manual_seed(0)
    by_position = Model(2)
    by_keyword = Model(2, keyword=True)
    by_keyword.load_state_dict(by_position.state_dict())
    one, two = (look_ahead(model, tokens(), loss, learning_rate=1e-3) for model in (by_position, by_keyword))
    assert one == two
    assert two.finite


def test_bad_arguments(model: Model) -> None:
    with pytest.raises(ConfigError, match="optimizer must be one of adamw, adam, lion, sgd, got 'adamx'"):
        look_ahead(model, tokens(), loss, learning_rate=0.1, optimizer="adamx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="learning rate must be positive"):
        look_ahead(model, tokens(), loss, learning_rate=0.0)
    with pytest.raises(ModelError, match="scalar tensor with a gradient"):
        look_ahead(model, tokens(), lambda output, batch: output, learning_rate=0.1)


def test_an_optimizer_of_ones_own_is_made_for_the_copy_and_steps_at_the_full_rate(model: Model) -> None:
    """Two groups, one with a muP factor, and a rate that the factory did not know."""
    made = []

    def make(moved: nn.Module) -> torch.optim.Optimizer:
        assert moved is not model
        first, *others = moved.parameters()
        groups = [{"params": [first], "factor": 0.5}, {"params": others, "momentum": 0.3}]
        made.append(torch.optim.SGD(groups, lr=1e9, momentum=0.9))
        return made[-1]

    result = look_ahead(model, tokens(), loss, learning_rate=0.02, optimizer=make, steps=3)
    assert len(made) == 1
    twin = copy.deepcopy(model).train()
    velocity = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    losses = []
    for _ in range(3):
        value = loss(twin(tokens()), tokens())
        losses.append(value.item())
        gradients = torch.autograd.grad(value, list(twin.parameters()))
        with torch.no_grad():
            for place, (parameter, gradient) in enumerate(zip(twin.parameters(), gradients, strict=True)):
                velocity[place] = (0.3 if place else 0.9) * velocity[place] + gradient
                parameter -= (0.02 if place else 0.01) * velocity[place]
    assert result.losses == pytest.approx(losses, rel=1e-10)


@pytest.mark.parametrize(("name", "beta2"), [("sgd", 0.9), ("adam", 1.0), ("lion", -0.1)])
def test_a_beta2_out_of_place_is_one_sentence(model: Model, name: str, beta2: float) -> None:
    with pytest.raises(ConfigError, match=r"beta2 belongs to adamw, adam or lion and lies in \[0, 1\), got"):
        make_optimizer(name, model, 0.01, beta2)


def test_it_sees_whether_the_blocks_hold_a_normalization():
    class TinyRMSNorm(nn.Module):
        pass

    class NoNorm(nn.Module):
        pass

    plain = nn.Sequential(nn.Linear(4, 4), NoNorm())
    assert not has_norm([plain])
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), TinyRMSNorm()):
        assert has_norm([plain, nn.Sequential(nn.Linear(4, 4), norm)])
