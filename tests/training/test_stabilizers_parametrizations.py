"""Normalized matrices: what a block computes with, a monitor loads, a resume needs, a profile leaves."""

import pytest
import torch
from torch import nn

from rksp_core import profile_model
from rksp_core.errors import ConfigError
from training.models.gpt import GPT
from training.models.moe import MoE
from training.optimizers import build_optimizer
from training.schema.optimizer import AdamW
from training.schema.stabilizers import Stabilizers
from training.stabilizers import apply_parametrizations, parametrized, plain_state_dict

INPUTS = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(1))
NORMS = ["spectral_norm", "weight_norm"]


def model(norm: str | None, **arguments) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(32, 8, 16, 2, 2, **arguments).double()
    apply_parametrizations(Stabilizers(**({} if norm is None else {norm: {}})), gpt)
    return gpt


def train(gpt: GPT, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        gpt(INPUTS).square().mean().backward()
        optimizer.step()


def test_without_a_section_the_model_stays_as_it_is():
    gpt = model(None)
    assert not parametrized(gpt)
    assert plain_state_dict(gpt).keys() == gpt.state_dict().keys()


def test_a_spectral_norm_is_one_once_the_iteration_has_converged():
    """To 1e-6: where the two largest singular values are close, the iteration turns slowly."""
    gpt = GPT(32, 8, 16, 1, 2).double()
    apply_parametrizations(Stabilizers(spectral_norm={"iterations": 1000}), gpt)
    gpt(INPUTS[:1, :1])
    for name, weight in plain_state_dict(gpt).items():
        if name.startswith("blocks.") and weight.dim() == 2:
            assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, rel=1e-6)


def test_weight_normalization_splits_length_and_direction():
    """It starts where the model does; then the direction's own length means nothing."""
    gpt, start = model("weight_norm"), model(None).state_dict()
    for name, weight in plain_state_dict(gpt).items():
        torch.testing.assert_close(weight, start[name], rtol=1e-14, atol=0)
    up = gpt.blocks[0].mlp.up
    before = up.weight.detach().clone()
    with torch.no_grad():
        up.parametrizations.weight.original1.mul_(3.0)
        torch.testing.assert_close(up.weight, before, rtol=1e-14, atol=0)
        up.parametrizations.weight.original0.mul_(3.0)
        torch.testing.assert_close(up.weight, 3 * before, rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_monitor_loads_the_effective_weights_into_the_plain_model(norm):
    gpt, plain = model(norm), model(None)
    train(gpt, build_optimizer(AdamW(learning_rate=0.01), gpt))
    assert parametrized(gpt)
    plain.load_state_dict(plain_state_dict(gpt))
    assert gpt.training
    assert torch.equal(plain.eval()(INPUTS), gpt.eval()(INPUTS))


@pytest.mark.parametrize("norm", NORMS)
def test_a_run_resumes_bitwise_from_the_state_of_the_model(norm):
    whole, parts = model(norm), model(norm)
    train(whole, build_optimizer(AdamW(), whole), 6)
    optimizer = build_optimizer(AdamW(), parts)
    train(parts, optimizer, 3)
    torch.manual_seed(99)
    later = model(norm)
    later.load_state_dict(parts.state_dict())
    resumed = build_optimizer(AdamW(), later)
    resumed.load_state_dict(optimizer.state_dict())
    train(later, resumed, 3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name]), name


@pytest.mark.parametrize("norm", NORMS)
def test_looking_changes_nothing(norm):
    """A profile, an evaluation and a plain copy: no power iteration, no change of mode."""
    gpt = model(norm)
    train(gpt, build_optimizer(AdamW(), gpt))
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    modes = [module.training for module in gpt.modules()]
    profile_model(gpt, INPUTS, samples=16)
    plain_state_dict(gpt)
    assert modes == [module.training for module in gpt.modules()]
    gpt.eval()(INPUTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gpt.state_dict().items())


def test_a_forward_pass_in_training_mode_iterates_once():
    gpt = model("spectral_norm")
    norm = gpt.blocks[0].mlp.up.parametrizations.weight
    u, w = norm[0]._u.clone(), norm.original.detach()
    gpt(INPUTS)
    v = nn.functional.normalize(w.T @ nn.functional.normalize(w @ norm[0]._v, dim=0), dim=0)
    assert not torch.equal(norm[0]._u, u)
    gpt(INPUTS)
    torch.testing.assert_close(norm[0]._v, v, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_what_cannot_be_normalized_is_named(norm):
    with pytest.raises(ConfigError, match=rf"stabilizers.{norm} needs an nn.Linear in the blocks"):
        apply_parametrizations(Stabilizers(**{norm: {}}), nn.Sequential(nn.Embedding(3, 4), nn.Embedding(4, 4)))
    gpt = model(None)
    nn.init.zeros_(gpt.blocks[1].mlp.output.weight)
    with pytest.raises(ConfigError, match=r"norm of blocks.1.mlp.output.weight, which starts at 0; choose another"):
        apply_parametrizations(Stabilizers(**{norm: {}}), gpt)
    with pytest.raises(ConfigError, match=r"and blocks.0.mlp.up.weight \(2, 64, 16\) is none; choose another"):
        apply_parametrizations(Stabilizers(**{norm: {}}), MoE(32, 8, 16, 1, 2, experts=2))
    gpt = model(None)
    gpt.learning_rate_factors = lambda: {"blocks.0.mlp.up.weight": 0.5}
    with pytest.raises(ConfigError, match="to which the learning rates of muP belong"):
        apply_parametrizations(Stabilizers(**{norm: {}}), gpt)
