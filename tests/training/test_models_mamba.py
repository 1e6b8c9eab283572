"""Mamba's mixer against its equations, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from training.models.mamba import Mamba, Mixer

WIDTH, STATE, INSIDE, KERNEL = 20, 3, 8, 4


def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer(WIDTH, STATE, INSIDE, KERNEL).double()


def token_by_token(mixer: Mixer, x: Tensor) -> Tensor:
    """Gu and Dao 2023, Alg. 2 and Fig. 3, for one sequence (T, d)."""
    u, gate = (x @ mixer.input.weight.T).split(INSIDE, dim=1)
    past = torch.cat([u.new_zeros(KERNEL - 1, INSIDE), u])
    filters = mixer.convolution.weight[:, 0]  # (e, kernel), the last of them sees the token itself
    rates = mixer.log_rate.exp().view(INSIDE, STATE)
    h, outputs = u.new_zeros(INSIDE, STATE), []
    for t in range(len(x)):
        v = functional.silu((past[t : t + KERNEL].T * filters).sum(1) + mixer.convolution.bias)
        low, into, out_of = (mixer.select.weight @ v).split([2, STATE, STATE])  # rank ceil(20 / 16) = 2
        delta = torch.log1p(torch.exp(mixer.step.weight @ low + mixer.step.bias))
        h = torch.exp(-delta[:, None] * rates) * h + (delta * v)[:, None] * into
        y = h @ out_of + mixer.skip * v
        outputs.append(mixer.output.weight @ (y * functional.silu(gate[t])))
    return torch.stack(outputs)


def test_a_mixer_is_its_equations_token_by_token():
    block = mixer()
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    got, expected = block(x), torch.stack([token_by_token(block, sequence) for sequence in x])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    wanted = (x, *block.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        rtol=1e-10,
        atol=1e-14,
    )


def test_steps_and_rates_start_as_published():
    block = mixer()
    steps = functional.softplus(block.step.bias)
    assert 1e-3 * 0.999 < steps.min() < steps.max() < 0.1 * 1.001
    torch.testing.assert_close(block.log_rate.exp(), torch.arange(1.0, STATE + 1).repeat(INSIDE).double())
    assert (block.skip == 1).all()


def test_the_output_projection_is_divided_by_the_root_of_the_depth():
    torch.manual_seed(0)
    model = Mamba(vocabulary=16, length=8, width=64, depth=4)
    for block in model.blocks:
        bound = 128**-0.5 / math.sqrt(4)  # torch draws uniformly up to 1 / sqrt(inputs)
        assert 0.99 * bound < block.mixer.output.weight.abs().max() <= bound


def test_decay_of_weights_spares_what_the_authors_spare():
    """They exempt A and D; the trainer exempts what has fewer than two dimensions."""
    model = Mamba(vocabulary=16, length=8, width=16, depth=1)
    spared = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}
    assert {"blocks.0.mixer.log_rate", "blocks.0.mixer.skip"} <= spared


def test_a_block_adds_the_mixer_of_the_normalized_stream():
    model = Mamba(vocabulary=16, length=8, width=16, depth=1)
    block, x = model.blocks[0], torch.randn(2, 8, 16)
    normalized = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), x + block.mixer(normalized))


def test_the_recurrence_keeps_float32_under_autocast():
    model, seen = Mamba(vocabulary=16, length=8, width=16, depth=1), []
    for module in (model.blocks[0].mixer.select, model.blocks[0].mixer.step):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(16, (2, 8)))
    assert seen == [torch.float32, torch.float32]
