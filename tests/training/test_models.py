"""What holds for every architecture: the profile, KSS, the loop's demands, sizes, and refusals."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rksp_core import KSSRegularizer, find_blocks, profile_model
from rksp_core.errors import ConfigError
from training.models import kan
from training.models.gpt import GPT
from training.models.initialization import INITIALIZATIONS
from training.models.kan import KAN
from training.models.mamba import Mamba
from training.models.moe import MoE
from training.models.norms import NORMS
from training.models.vit import ViT
from training.ranks import Ranks
from training.run import build_run
from training.step import advance

from .conftest import Configure

SMALL: dict[type[nn.Module], dict[str, Any]] = {
    GPT: {"vocabulary": 16, "length": 8, "width": 16, "depth": 2, "heads": 2},
    MoE: {"vocabulary": 16, "length": 8, "width": 16, "depth": 2, "heads": 2, "experts": 4},
    KAN: {"vocabulary": 16, "length": 8, "width": 16, "depth": 2, "heads": 2},
    Mamba: {"vocabulary": 16, "length": 8, "width": 16, "depth": 2},
    ViT: {"image": 8, "channels": 1, "classes": 16, "patch": 2, "width": 16, "depth": 2, "heads": 2},
}
each_model = pytest.mark.parametrize("factory", SMALL)


def small(factory: type[nn.Module], **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return factory(**SMALL[factory] | arguments)


def inputs_of(factory: type[nn.Module], count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if factory is ViT:
        return torch.randn(count, 1, 8, 8, generator=generator)
    return torch.randint(16, (count, 8), generator=generator)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Cross-entropy with arbitrary classes, and what the model adds."""
    logits = model(inputs).flatten(0, -2)
    loss = functional.cross_entropy(logits, torch.arange(len(logits)) % 16)
    return loss + model.auxiliary_loss() if hasattr(model, "auxiliary_loss") else loss


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_model
def test_every_parameter_learns(factory):
    for name, gradient in gradients(small(factory), inputs_of(factory)).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        # softmax does not see what is added to every score, so the bias of the keys has the gradient 0
        assert gradient.any() or name.endswith("key.bias"), name


@each_model
def test_the_profile_has_every_block(factory):
    model = small(factory)
    assert [block.module for block in find_blocks(model)] == list(model.blocks)
    profile = profile_model(model, inputs_of(factory, 32))
    assert [layer.layer for layer in profile.layers] == ["blocks.0", "blocks.1"]
    assert all(layer.spectral_radius > 0 for layer in profile.layers)


@each_model
def test_kss_shapes_every_block(factory):
    model = small(factory)
    regularizer = KSSRegularizer(model, alpha=0.1, interval=1, layer_fraction=1.0, rank=8)
    with regularizer:
        model(inputs_of(factory, 32))
    regularizer.term().backward()
    assert regularizer.skipped_layers == 0
    assert all(any(part.grad.any() for part in block.parameters() if part.grad is not None) for block in model.blocks)


@each_model
def test_checkpointed_blocks_give_the_same_gradients(factory):
    """The loop wraps the forward of each block, and computes it again in the backward pass."""
    model, inputs = small(factory).double(), inputs_of(factory)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    expected = gradients(model, inputs)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch.testing.assert_close(gradients(model, inputs), expected, rtol=1e-10, atol=1e-14)


@each_model
def test_bfloat16_autocast(factory):
    model, inputs = small(factory), inputs_of(factory)
    full = loss_of(model, inputs).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(full, rel=0.01)  # 8 bits of mantissa in the matrix products
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_model
def test_a_model_can_be_copied_after_a_forward_pass(factory):
    """The look-ahead trains a copy; it starts without the graph of what ran before."""
    model, inputs = small(factory), inputs_of(factory)
    loss_of(model, inputs)
    torch.testing.assert_close(copy.deepcopy(model)(inputs), model(inputs), rtol=0, atol=0)


@each_model
def test_a_batch_is_learned(factory):
    model, inputs = small(factory), inputs_of(factory)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factory", [MoE, KAN, ViT])
def test_every_residual_scheme_serves_every_transformer(factory, norm):
    model = small(factory, norm=norm)
    assert all(gradient.isfinite().all() for gradient in gradients(model, inputs_of(factory)).values())
    assert isinstance(model.blocks[0].join_mlp, NORMS[norm])


@pytest.mark.parametrize(
    ("factory", "initialization"),
    [
        *((factory, name) for factory in (MoE, ViT) for name in INITIALIZATIONS),
        *((KAN, name) for name in kan.INITIALIZATIONS),
    ],
)
def test_every_initialization_serves_the_transformers(factory, initialization):
    arguments = {"norm": "no_norm"} if initialization in ("fixup", "rezero") else {}
    arguments |= {"base_width": 8} if initialization == "mup" else {}
    model, inputs = small(factory, initialization=initialization, **arguments), inputs_of(factory)
    before = loss_of(model, inputs).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    assert loss_of(model, inputs).item() < before < 10


@pytest.mark.parametrize("factory", [GPT, Mamba])
def test_a_decoder_looks_at_the_past_only(factory):
    model, tokens = small(factory), inputs_of(factory)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 16
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=0, atol=0)


def test_a_vision_transformer_looks_everywhere():
    model, images = small(ViT, initialization="torch"), inputs_of(ViT)
    changed = images.clone()
    changed[:, :, -1, -1] += 1  # in the last patch; the head reads the first token
    assert (model(images) != model(changed)).all()


# A custom autograd function is instantiated by dynamo itself, which torch announces to forbid.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("factory", [MoE, Mamba])
def test_compiled_in_one_graph(factory):
    """The two with more than matrix products; traced by dynamo, and run without the minutes that inductor takes."""
    model, inputs = small(factory, depth=1), inputs_of(factory)
    expected, auxiliary = model(inputs), [model.auxiliary_loss()] if factory is MoE else []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), expected, rtol=0, atol=0)
    assert auxiliary == ([model.auxiliary_loss()] if factory is MoE else [])


@pytest.mark.parametrize(
    ("factory", "arguments", "millions"),
    [
        (GPT, {"vocabulary": 256, "length": 64, "width": 128, "depth": 5, "heads": 4}, 1.1),
        (GPT, {"vocabulary": 10_000, "length": 256, "width": 256, "depth": 6, "heads": 8}, 9.9),
        (GPT, {"vocabulary": 50_257, "length": 1024, "width": 768, "depth": 12, "heads": 12}, 163.0),
        (GPT, {"vocabulary": 10_000, "length": 256, "width": 1024, "depth": 24, "heads": 16}, 323.1),
        (MoE, {"vocabulary": 10_000, "length": 256, "width": 256, "depth": 6, "heads": 8, "experts": 8}, 31.9),
        (KAN, {"vocabulary": 10_000, "length": 256, "width": 256, "depth": 6, "heads": 8, "basis": 4}, 10.7),
        (Mamba, {"vocabulary": 10_000, "length": 256, "width": 256, "depth": 6}, 7.7),
        (Mamba, {"vocabulary": 50_257, "length": 1024, "width": 1024, "depth": 36}, 342.9),
        (ViT, {"image": 224, "channels": 3, "classes": 10, "width": 192, "depth": 6, "heads": 3}, 2.9),
        (ViT, {"image": 224, "channels": 3, "classes": 1000, "width": 1024, "depth": 24, "heads": 16}, 304.3),
    ],
)
def test_sizes_from_one_million_to_350_million_parameters(factory, arguments, millions):
    with torch.device("meta"):
        model = factory(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("depth", [1, 3])
def test_gpt_has_the_parameters_of_its_formula(depth):
    d, v, t = 16, 20, 8
    model = GPT(vocabulary=v, length=t, width=d, depth=depth, heads=2)
    matrices, vectors = 12 * d * d, 9 * d + 4 * d  # four of d x d, two of d x 4d; their biases, two LayerNorms
    assert sum(each.numel() for each in model.parameters()) == depth * (matrices + vectors) + 2 * v * d + t * d + 2 * d


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (MoE, {"top_k": 5}, "model.arguments.top_k must be at most experts, got top_k 5 of 4 experts"),
        (MoE, {"experts": 0}, "model.arguments.experts must be a whole number of at least 1, got 0"),
        (MoE, {"capacity": 0.0}, "model.arguments.capacity must be a number above 0, got 0.0"),
        (MoE, {"balance": "none"}, "model.arguments.balance must be a number of at least 0, got 'none'"),
        (KAN, {"basis": 3}, "model.arguments.basis must be at least 4 for splines of order 3, got 3"),
        (
            KAN,
            {"initialization": "mup"},
            "model.arguments.initialization must be one of gpt2, gpt2_unscaled, published",
        ),
        (KAN, {"heads": 3}, "model.arguments.heads must divide width, got 3 heads for width 16; choose a divisor"),
        (Mamba, {"norm": "deepnorm"}, "model.arguments.norm must be one of no_norm, post_ln, pre_ln, rmsnorm, got"),
        (Mamba, {"state": 1.5}, "model.arguments.state must be a whole number of at least 1, got 1.5"),
        (ViT, {"patch": 3}, "model.arguments.patch must divide image, got patches of 3 for image 8; choose a divisor"),
        (ViT, {"heads": 5}, "model.arguments.heads must divide width, got 5 heads for width 16; choose a divisor"),
        (
            ViT,
            {"pooling": "cls"},
            "model.arguments.pooling must be one of class, mean, got 'cls'; did you mean 'class'?",
        ),
    ],
)
def test_impossible_arguments_are_refused_in_one_sentence(factory, arguments, message):
    with pytest.raises(ConfigError) as refusal:
        small(factory, **arguments)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("factory", [MoE, KAN, Mamba])
def test_the_trainer_takes_every_decoder(factory, configure: Configure):
    arguments = SMALL[factory] | {"vocabulary": 32, "length": 16}
    model = {"factory": f"{factory.__module__}:{factory.__name__}", "arguments": arguments}
    config = configure(model=model, kss={"alpha": 0.1, "interval": 1}, activation_checkpointing=True)
    run = build_run(config, Ranks(0, 1, torch.device("cpu")))
    records = [advance(run) for _ in range(2)]
    assert all(record.kss_term > 0 and record.kss_skipped_layers == 0 for record in records)
    assert all((record.auxiliary_loss > 0) == (factory is MoE) for record in records)
