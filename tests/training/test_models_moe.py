"""A mixture of experts against a loop over tokens and experts."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.models.gpt import MLP
from training.models.initialization import Initialization
from training.models.moe import Mixture, MoE
from training.models.norms import PreLN, SubLN

WIDTH, EXPERTS, TOKENS = 6, 4, 24


def mixture(top_k: int, capacity: float, residual: type[PreLN] = PreLN, experts: int = EXPERTS) -> Mixture:
    torch.manual_seed(0)
    return Mixture(WIDTH, experts, top_k, capacity, Initialization("published", residual, 2)).double()


def stream() -> Tensor:
    x = torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[..., 0] += 1  # so that some experts are preferred, and overrun
    return x.requires_grad_()


def pair_by_pair(mixture: Mixture, x: Tensor) -> tuple[Tensor, float, int]:
    """Return output, imbalance and the number of dropped pairs; the first choices of all tokens come first."""
    tokens = x.reshape(-1, WIDTH)
    probabilities = (tokens @ mixture.router.weight.T).softmax(-1)
    preferred = probabilities.argsort(descending=True)[:, : mixture.top_k]
    room = math.ceil(mixture.capacity * mixture.top_k * len(tokens) / mixture.experts)
    outputs, served, asked, dropped = list(torch.zeros_like(tokens)), [0] * mixture.experts, [0] * mixture.experts, 0
    for choice in range(mixture.top_k):
        for number, token in enumerate(tokens):
            expert = int(preferred[number, choice])
            asked[expert] += 1
            if served[expert] == room:
                dropped += 1
                continue
            served[expert] += 1
            inside = functional.gelu(mixture.up.weight[expert] @ token, approximate="tanh")
            gate = probabilities[number, expert]
            if mixture.top_k > 1:
                gate = gate / probabilities[number, preferred[number]].sum()
            outputs[number] = outputs[number] + gate * (mixture.output.weight[expert] @ mixture.inner(inside))
    shares = [count / sum(asked) for count in asked]
    imbalance = mixture.experts * sum(f * p for f, p in zip(shares, probabilities.mean(0), strict=True))
    return torch.stack(outputs).view(x.shape), imbalance, dropped


@pytest.mark.parametrize("residual", [PreLN, SubLN])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("capacity", [0.3, 1.0, 4.0])
def test_it_is_the_loop_over_tokens_and_experts(top_k, capacity, residual):
    layer, x = mixture(top_k, capacity, residual), stream()
    got, (expected, imbalance, dropped) = layer(x), pair_by_pair(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(layer.imbalance, imbalance, rtol=1e-10, atol=0)
    assert float(layer.dropped_share) == pytest.approx(dropped / (top_k * TOKENS))
    assert bool(dropped) == (capacity < 1 or (capacity == 1 and top_k < 4))  # k = 4 of 4 fills every expert evenly
    wanted = (x, *layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum() + layer.imbalance, wanted),
        torch.autograd.grad(expected.square().sum() + imbalance, wanted),
        rtol=1e-10,
        atol=1e-13,
    )


def test_a_dropped_token_passes_by_the_residual_stream():
    layer, x = mixture(top_k=1, capacity=1 / TOKENS), stream()  # each expert takes a single token
    update = layer(x).view(-1, WIDTH)
    assert int(update.any(-1).sum()) == round(TOKENS * (1 - float(layer.dropped_share))) <= EXPERTS


def test_one_expert_is_the_mlp():
    layer, x = mixture(top_k=1, capacity=1.0, experts=1), stream()
    mlp = MLP(WIDTH, Initialization("published", PreLN, 2)).double()
    with torch.no_grad():
        mlp.up.weight.copy_(layer.up.weight[0])
        mlp.output.weight.copy_(layer.output.weight[0])
        mlp.up.bias.zero_()
        mlp.output.bias.zero_()
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-10, atol=1e-14)


def test_the_load_is_balanced_at_imbalance_one_and_worst_at_the_number_of_experts():
    layer, x = mixture(top_k=1, capacity=4.0), stream()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer(x)
        assert layer.imbalance.item() == pytest.approx(1)  # equal probabilities, whoever is chosen
        layer.router.weight[2, 0] = 1e6
        layer(torch.ones_like(x))
        assert layer.imbalance.item() == pytest.approx(EXPERTS)


def test_the_loss_of_a_model_is_the_weighted_sum_over_its_blocks():
    torch.manual_seed(0)
    model = MoE(vocabulary=16, length=8, width=16, depth=3, heads=2, experts=4, balance=0.03)
    model(torch.randint(16, (4, 8)))
    expected = 0.03 * sum(mixture.imbalance.item() for mixture in model.mixtures)
    assert model.auxiliary_loss().item() == pytest.approx(expected)
    assert 0 <= model.dropped_share < 1
    model.auxiliary_loss().backward()
    assert all(mixture.router.weight.grad.any() for mixture in model.mixtures)
    assert pickle.loads(pickle.dumps(model)).auxiliary_loss().item() == 0


def test_balancing_spreads_a_lopsided_load():
    layer, x = mixture(top_k=1, capacity=1.0), stream().detach()
    with torch.no_grad():
        layer.router.weight[2, 0] = 3
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.05)
    imbalances = []
    for _ in range(40):
        layer(x)
        imbalances.append(layer.imbalance.item())
        optimizer.zero_grad()
        layer.imbalance.backward()
        optimizer.step()
    assert imbalances[0] > 1.8
    assert imbalances[-1] < 1.1


def test_the_router_keeps_float32_under_autocast():
    torch.manual_seed(0)
    model = MoE(vocabulary=16, length=8, width=16, depth=1, heads=2)
    seen = []
    model.mixtures[0].router.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(16, (4, 8)))
    assert [each.dtype for each in seen] == [torch.float32, torch.float32]


def test_experts_start_as_the_matrices_of_an_mlp_do():
    torch.manual_seed(0)
    model = MoE(vocabulary=16, length=8, width=64, depth=2, heads=2, norm="deepnorm", experts=4)
    layer = model.mixtures[0]
    gain = (8 * 2) ** -0.25
    for weight in (*layer.up.weight, *layer.output.weight):
        assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / (64 + 256)), rel=0.05)
    assert layer.router.weight.std().item() == pytest.approx(0.02, rel=0.15)
