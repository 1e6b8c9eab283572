"""Each optimizer against its published update written plainly, over a few steps in float64; groups, muP, and resume."""

import math
import sys

import pytest
import torch
from torch import nn

from rksp_core.errors import ConfigError
from training.models.gpt import GPT
from training.optimizers import build_optimizer
from training.schema.optimizer import SGD, AdamW, Lamb, Lion

RATE, DECAY, STEPS = 0.02, 0.1, 6

SECTIONS = {
    "adamw": AdamW(learning_rate=RATE, weight_decay=DECAY),
    "lion": Lion(learning_rate=RATE, weight_decay=DECAY),
    "lamb": Lamb(learning_rate=RATE, weight_decay=DECAY),
    "sgd": SGD(learning_rate=RATE, weight_decay=DECAY),
    "nesterov": SGD(learning_rate=RATE, weight_decay=DECAY, nesterov=True),
}


def adamw(x, gradients, decay):
    """Loshchilov and Hutter 2019, Algorithm 2, with the rate in front of the decay, as everybody has it."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        x = x - RATE * (step + decay * x)
    return x


def lion(x, gradients, decay):
    """Chen et al. 2023, Algorithm 2."""
    m = torch.zeros_like(x)
    for g in gradients:
        x = x - RATE * ((0.9 * m + 0.1 * g).sign() + decay * x)
        m = 0.99 * m + 0.01 * g
    return x


def lamb(x, gradients, decay):
    """You et al. 2020, Algorithm 2, phi(z) = z; the ratio is 1 where it is 0 / 0."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + decay * x
        length, reach = math.sqrt((x**2).sum()), math.sqrt((r**2).sum())
        x = x - RATE * (length / reach if length > 0 and reach > 0 else 1.0) * r
    return x


def sgd(x, gradients, decay, *, nesterov=False):
    """Sutskever et al. 2013, in torch's form: the decay joins the gradient, the rate stays outside the velocity."""
    velocity = torch.zeros_like(x)
    for g in gradients:
        g = g + decay * x
        velocity = 0.9 * velocity + g
        x = x - RATE * (g + 0.9 * velocity if nesterov else velocity)
    return x


ORACLES = {
    "adamw": adamw,
    "lion": lion,
    "lamb": lamb,
    "sgd": sgd,
    "nesterov": lambda *arguments: sgd(*arguments, nesterov=True),
}


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    nn.init.zeros_(model[2].weight)
    return model


def gradient(index: int, t: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * index + t), dtype=like.dtype)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = gradient(index, t, parameter)
        optimizer.step()


@pytest.mark.parametrize("name", SECTIONS)
def test_the_update_is_the_published_one(name):
    """A matrix that starts at 0 is among them, and the decay is on matrices only."""
    model = plain_model()
    starts = [parameter.detach().clone() for parameter in model.parameters()]
    advance(model, build_optimizer(SECTIONS[name], model), range(STEPS))
    for index, (parameter, start) in enumerate(zip(model.parameters(), starts, strict=True)):
        gradients = [gradient(index, t, start) for t in range(STEPS)]
        expected = ORACLES[name](start, gradients, DECAY if start.dim() >= 2 else 0.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", SECTIONS)
def test_an_optimizer_resumes_bitwise_from_its_state(name):
    whole, parts, later = plain_model(), plain_model(), plain_model()
    advance(whole, build_optimizer(SECTIONS[name], whole), range(6))
    optimizer = build_optimizer(SECTIONS[name], parts)
    advance(parts, optimizer, range(3))
    later.load_state_dict(parts.state_dict())
    resumed = build_optimizer(SECTIONS[name], later)
    resumed.load_state_dict(optimizer.state_dict())
    advance(later, resumed, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), later.parameters(), strict=True))


def test_lamb_moves_a_matrix_by_the_rate_times_its_length():
    """However large the gradient is: the property that the trust ratio is there for."""
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = build_optimizer(Lamb(learning_rate=0.01), model)
    for size in (1e-3, 1.0, 1e6):
        before = model.weight.detach().clone()
        model.weight.grad = size * gradient(0, 0, before)
        optimizer.step()
        assert float((model.weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-10)


def test_lamb_takes_a_closure():
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(Lamb(), model)

    def closure():
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


class Scaled(GPT):
    """A model with muP's rule, as far as an optimizer sees it."""

    def learning_rate_factors(self) -> dict[str, float]:
        return {"blocks.0.mlp.up.weight": 0.25, "blocks.1.mlp.up.weight": 0.25, "blocks.0.mlp.up.bias": 1.0}


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))


def test_a_model_tells_the_factors_of_its_rates():
    """The product of rate and decay is the same for every matrix."""
    model = Scaled(32, 16, 16, 2, 2)
    optimizer = build_optimizer(AdamW(weight_decay=0.1), model)
    up, other = (block.mlp.up for block in model.blocks)
    for parameter, factor, decay in (
        (up.weight, 0.25, 0.4),
        (other.weight, 0.25, 0.4),
        (up.bias, 1.0, 0.0),
        (model.head.weight, 1.0, 0.1),
    ):
        group = group_of(optimizer, parameter)
        assert (group.get("factor", 1.0), group["weight_decay"]) == (factor, decay)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("section", "factors", "message"),
    [
        (AdamW(), {"blocks.9.mlp.up.weight": 0.5}, "names 'blocks.9.mlp.up.weight', which is no parameter of it"),
        (AdamW(), {"head.weight": 0.0}, "must be above 0, got 0.0 for 'head.weight'"),
        (SGD(), {"head.weight": 0.5}, "are Adam's; choose optimizer.name adamw or lion, got 'sgd'"),
        (Lamb(), {"head.weight": 0.5}, "are Adam's; choose optimizer.name adamw or lion, got 'lamb'"),
    ],
)
def test_factors_that_cannot_be_meant(section, factors, message):
    model = GPT(32, 16, 16, 1, 2)
    model.learning_rate_factors = lambda: factors
    with pytest.raises(ConfigError, match=message):
        build_optimizer(section, model)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ConfigError, match=r"optimizer.name: lion needs lion-pytorch; pip install 'rksp\[trainer\]'"):
        build_optimizer(Lion(), plain_model())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "lionn"}, "must be one of adamw, lamb, lion, sgd, got 'lionn'; did you mean 'lion'?"),
        ({"name": "sgd", "momentm": 0.5}, "unknown key 'optimizer.momentm'; did you mean 'optimizer.momentum'?"),
        ({"name": "sgd", "nesterov": True, "momentum": 0}, "optimizer.nesterov needs an optimizer.momentum above 0"),
        ({"name": "lion", "betas": [0.9, 1.0]}, "optimizer.betas.1 cannot be 1.0: it should be less than 1"),
        ({"betas": [0.9]}, "the key 'optimizer.betas.1' is missing"),
    ],
)
def test_a_mistake_in_the_section_is_one_sentence(configure, optimizer, message):
    with pytest.raises(ConfigError) as raised:
        configure(optimizer=optimizer)
    assert message in str(raised.value)


def test_a_section_without_a_name_is_adamw(configure):
    assert configure(optimizer={"learning_rate": 0.1}).optimizer == AdamW(learning_rate=0.1)
