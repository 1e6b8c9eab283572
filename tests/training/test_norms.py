"""Each residual connection is the formula of its paper; so is the initialization that belongs to it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from rksp_core import find_blocks, profile_model
from rksp_core.errors import ConfigError
from training.models.gpt import GPT
from training.models.norms import NORMS, Fixup, ReZero

WIDTH, DEPTH = 64, 4


def gpt(norm: str, **arguments: object) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=32, length=16, width=WIDTH, depth=DEPTH, heads=4, norm=norm, **arguments)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("norm", "formula"),
    [
        ("no_norm", lambda x, f: x + f(x)),
        ("pre_ln", lambda x, f: x + f(layer_norm(x))),
        ("post_ln", lambda x, f: layer_norm(x + f(x))),
        ("rmsnorm", lambda x, f: x + f(rms(x))),
        ("deepnorm", lambda x, f: layer_norm((2 * DEPTH) ** 0.25 * x + f(x))),
        ("subln", lambda x, f: x + f(layer_norm(x))),
        ("deepnorm_pre_ln", lambda x, f: (2 * DEPTH) ** 0.25 * x + f(layer_norm(x))),
    ],
)
def test_a_residual_connection_is_its_published_formula(norm, formula):
    x = torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(NORMS[norm](WIDTH, DEPTH)(x, torch.sin), formula(x, torch.sin), rtol=1e-5, atol=1e-5)


def test_fixup_and_rezero_join_by_scalars():
    x = torch.randn(2, 3, WIDTH)
    fixup, rezero = Fixup(WIDTH, DEPTH), ReZero(WIDTH, DEPTH)
    torch.testing.assert_close(fixup(x, torch.sin), x + torch.sin(x))
    torch.testing.assert_close(rezero(x, torch.sin), x)
    with torch.no_grad():
        fixup.multiplier.fill_(3)
        fixup.shift.bias.fill_(0.5)
        rezero.multiplier.fill_(2)
    torch.testing.assert_close(fixup(x, torch.sin), x + 3 * torch.sin(x + 0.5))
    torch.testing.assert_close(rezero(x, torch.sin), x + 2 * torch.sin(x))


def test_the_pre_ln_form_of_deepnorm_expands_every_mode_and_the_published_form_does_not():
    """Kim et al. 2026, Table 1, DeepNorm: near-unit mass 0.00, expansive mass 1.00."""
    tokens = torch.randint(32, (32, 16), generator=torch.Generator().manual_seed(0))
    masses = {norm: profile_model(gpt(norm), tokens).summary for norm in ("deepnorm", "deepnorm_pre_ln")}
    assert masses["deepnorm_pre_ln"]["near_unit_mass"]["mean"] == 0
    assert masses["deepnorm_pre_ln"]["expansive_mass"]["mean"] > 0.98
    assert masses["deepnorm"]["near_unit_mass"]["mean"] > 0.5


def test_subln_has_a_norm_in_front_of_each_output_projection():
    block = gpt("subln").blocks[0]
    x = torch.randn(2, 16, WIDTH)
    hidden = functional.gelu(block.mlp.up(x), approximate="tanh")
    torch.testing.assert_close(block.mlp(x), block.mlp.output(layer_norm(hidden)), rtol=1e-5, atol=1e-5)
    assert isinstance(block.attention.inner, nn.LayerNorm)


def test_attention_is_softmax_of_the_past_only():
    attention = gpt("pre_ln", initialization="torch").blocks[0].attention
    x = torch.randn(2, 5, WIDTH)
    q, k, v = (f(x).view(2, 5, 4, 16).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, WIDTH)
    torch.testing.assert_close(attention(x), attention.output(mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("norm", "gain"), [("deepnorm", (8 * DEPTH) ** -0.25), ("subln", math.log(2 * DEPTH) ** 0.5)])
def test_deepnorm_and_subln_scale_value_output_and_mlp_but_not_query_and_key(norm, gain):
    block = gpt(norm).blocks[0]
    for linear, expected in [
        (block.attention.query, 1.0),
        (block.attention.key, 1.0),
        (block.attention.value, gain),
        (block.attention.output, gain),
        (block.mlp.up, gain),
        (block.mlp.output, gain),
    ]:
        xavier = math.sqrt(2 / sum(linear.weight.shape))
        # the standard deviation of n normal numbers has a relative error of 1 / sqrt(2 n): 1.1 % for 64 x 64
        assert linear.weight.std().item() == pytest.approx(expected * xavier, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize("norm", ["no_norm", "pre_ln", "post_ln", "rmsnorm", "deepnorm_pre_ln"])
def test_the_other_norms_start_as_gpt2_does(norm):
    model = gpt(norm)
    scaled = 0.02 / math.sqrt(2 * DEPTH)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            expected = scaled if name.endswith(("attention.output.weight", "mlp.output.weight")) else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_unscaled_initialization_gives_every_matrix_the_same_spread(norm):
    for name, weight in gpt(norm, initialization="gpt2_unscaled").named_parameters():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_the_blocks_are_found_and_keep_the_shape_of_the_stream(norm):
    model = gpt(norm)
    assert [block.module for block in find_blocks(model)] == list(model.blocks)
    assert model.blocks[0](torch.randn(2, 16, WIDTH)).shape == (2, 16, WIDTH)
    assert model(torch.randint(32, (2, 16))).shape == (2, 16, 32)


def test_the_model_looks_at_the_past_only():
    model = gpt("pre_ln")
    tokens = torch.randint(32, (1, 16))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 32
    torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "heads must divide width, got 3 heads for width 64"),
        ({"norm": "pre_nl"}, "did you mean 'pre_ln'?"),
        ({"initialization": "gpt"}, "did you mean 'gpt2'?"),
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        GPT(**{"vocabulary": 32, "length": 16, "width": 64} | arguments)
