"""How models start: Fixup, ReZero and muP as published, and what muP promises over widths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core import profile_model
from rksp_core.errors import ConfigError
from training.models.gpt import GPT
from training.models.moe import MoE
from training.models.norms import NORMS
from training.models.vit import ViT

DEPTH = 4


def gpt(width: int = 64, **arguments: object) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=32, length=16, width=width, depth=DEPTH, heads=4, **arguments)


def moe(width: int, **arguments: object) -> MoE:
    torch.manual_seed(0)
    return MoE(vocabulary=32, length=16, width=width, depth=2, heads=4, experts=4, **arguments)


def vit(width: int, **arguments: object) -> ViT:
    torch.manual_seed(0)
    return ViT(image=8, channels=1, classes=10, patch=2, width=width, depth=2, heads=4, **arguments)


TOKENS = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TestFixup:
    def test_branches_start_at_zero_and_so_does_the_head(self) -> None:
        model = gpt(norm="no_norm", initialization="fixup")
        x = torch.randn(2, 16, 64)
        for block in model.blocks:
            torch.testing.assert_close(block(x), x, rtol=0, atol=0)
        assert not model(TOKENS).any()

    def test_the_other_matrices_are_scaled_by_the_number_of_branches(self) -> None:
        """L^(-1/(2m - 2)) of He in an MLP, m = 2, and of Xavier in attention, m = 4; L = 2 depth."""
        block = gpt(norm="no_norm", initialization="fixup").blocks[0]
        branches = 2 * DEPTH
        assert block.mlp.up.weight.std().item() == pytest.approx(math.sqrt(2 / 64) * branches ** (-1 / 2), rel=0.05)
        for linear in (block.attention.query, block.attention.key, block.attention.value):
            assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / 128) * branches ** (-1 / 6), rel=0.05)

    def test_a_scalar_in_front_of_every_matrix_and_behind_every_branch(self) -> None:
        names = {name for name, weight in gpt(norm="no_norm", initialization="fixup").named_parameters()}
        for branch in ("attention", "mlp"):
            assert f"blocks.0.join_{branch}.shift.bias" in names
            assert f"blocks.0.join_{branch}.multiplier" in names
            assert f"blocks.0.{branch}.inner.bias" in names

    def test_a_step_changes_the_output_alike_at_every_depth(self) -> None:
        """The design of Fixup. Torch's own start, without a norm, moves the output thousands of times as far."""
        fixup, plain = ([change_in_a_step(depth, start) for depth in (2, 32)] for start in ("fixup", "torch"))
        assert fixup[1] < 10 * fixup[0]
        assert plain[1] > 1000 * plain[0]


class TestReZero:
    def test_every_branch_starts_closed(self) -> None:
        model = gpt(norm="no_norm", initialization="rezero")
        x = torch.randn(2, 16, 64)
        for block in model.blocks:
            torch.testing.assert_close(block(x), x, rtol=0, atol=0)
            assert block.mlp.up.weight.std().item() == pytest.approx(math.sqrt(2 / 320), rel=0.05)  # Xavier

    def test_the_scalars_open_first(self) -> None:
        model = gpt(norm="no_norm", initialization="rezero")
        functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        assert model.blocks[0].join_mlp.multiplier.grad.any()
        assert not model.blocks[0].mlp.up.weight.grad.any()


def change_in_a_step(depth: int, initialization: str) -> float:
    """Return the relative change of the logits in one step of SGD at rate 1e-4, embeddings and head of size 1."""
    torch.manual_seed(0)
    model = GPT(32, 16, width=16, depth=depth, heads=2, norm="no_norm", initialization=initialization).double()
    for weight, std in ((model.token.weight, 1.0), (model.position.weight, 1.0), (model.head.weight, 0.25)):
        nn.init.normal_(weight, std=std)  # a head of 0 passes no gradient in the first step
    before = model(TOKENS)
    functional.cross_entropy(before.flatten(0, 1), TOKENS.roll(1, 1).flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    return ((model(TOKENS) - before).norm() / before.norm()).item()


@pytest.mark.parametrize("initialization", ["fixup", "rezero"])
def test_a_profile_of_closed_branches_is_not_informative_yet(initialization: str) -> None:
    """They are the identity, so near-unit mass is 1 and says nothing: method.md, section 9."""
    profile = profile_model(gpt(norm="no_norm", initialization=initialization), TOKENS)
    assert all("degenerate_update" in layer.status and layer.near_unit_mass == 1 for layer in profile.layers)


class TestMuP:
    @pytest.mark.parametrize("norm", NORMS)
    def test_at_the_base_width_it_is_the_published_model(self, norm: str) -> None:
        published, mup = gpt(norm=norm), gpt(norm=norm, initialization="mup", base_width=64)
        torch.testing.assert_close(mup(TOKENS), published(TOKENS))
        assert set(mup.learning_rate_factors().values()) == {1.0}
        assert published.learning_rate_factors() == {}

    def test_each_role_scales_as_in_table_8(self) -> None:
        """Four times the base width; hidden variance ~ 1/width, the others stay, Adam's rate ~ 1/width for hidden."""
        narrow, wide = (gpt(width, initialization="mup", base_width=64) for width in (64, 256))
        factors = wide.learning_rate_factors()
        assert factors.keys() == dict(wide.named_parameters()).keys()
        for (name, weight), (_, base) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
            hidden = name.startswith("blocks.") and weight.dim() == 2
            assert factors[name] == (0.25 if hidden else 1.0), name
            if weight.dim() == 2:
                ratio = weight.std().item() / base.std().item()
                assert ratio == pytest.approx(0.5 if hidden else 1.0, rel=0.1), name
        assert wide.blocks[0].attention.scale == pytest.approx(4 / 64)  # sqrt(base d/H) / (d/H)
        x = torch.randn(2, 256)
        torch.testing.assert_close(wide.head(x), x @ wide.head.weight.T / 4)

    def test_factors_keep_their_names_when_matrices_are_parametrized(self) -> None:
        """The trainer asks for them after weight normalization, which renames the parameters."""
        model = gpt(64, initialization="mup", base_width=32)
        before = model.learning_rate_factors()
        nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.up)
        assert model.learning_rate_factors() == before

    def test_the_router_is_a_readout_and_the_experts_are_hidden(self) -> None:
        model = moe(64, initialization="mup", base_width=32)
        factors = model.learning_rate_factors()
        assert factors["blocks.0.mlp.router.weight"] == 1
        assert factors["blocks.0.mlp.up.weight"] == factors["blocks.0.mlp.output.weight"] == 0.5
        x = torch.randn(3, 64)
        torch.testing.assert_close(model.mixtures[0].router(x), x @ model.mixtures[0].router.weight.T / 2)

    @pytest.mark.parametrize(
        ("make", "norm"), [*((gpt, norm) for norm in NORMS), (moe, "pre_ln"), (vit, "pre_ln"), (vit, "post_ln")]
    )
    def test_activations_keep_their_size_over_widths(self, make, norm: str) -> None:
        """The coordinate check of Yang et al. 2022, App. D.1."""
        sizes = [after_steps_of_adam(make(w, norm=norm, initialization="mup", base_width=32)) for w in (32, 128)]
        for name, narrow in sizes[0].items():
            assert 1 / 3 < sizes[1][name] / narrow < 2, name  # measured 0.4 to 1.4

    @pytest.mark.parametrize("make", [gpt, moe, vit])
    def test_without_it_they_grow(self, make) -> None:
        narrow, wide = (after_steps_of_adam(make(width, initialization="gpt2")) for width in (32, 128))
        assert all(wide[name] / narrow[name] > 5 for name in narrow if name != "logits")  # measured 11 to 30


def after_steps_of_adam(model: nn.Module) -> dict[str, float]:
    """Return the mean size of an entry of each block's output and of the logits, after four steps at rate 0.01."""
    inputs = IMAGES if isinstance(model, ViT) else TOKENS
    factors = model.learning_rate_factors()
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": 0.01 * factors.get(name, 1.0)} for name, weight in model.named_parameters()]
    )
    sizes: dict[str, float] = {}

    def record(name: str, value: Tensor) -> None:
        sizes[name] = value.abs().mean().item()

    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, inputs, output, number=number: record(f"block {number}", output))
    targets = torch.randint(10, (8 if isinstance(model, ViT) else 128,), generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        logits = model(inputs).flatten(0, -2)
        optimizer.zero_grad()
        functional.cross_entropy(logits, targets).backward()
        optimizer.step()
    record("logits", logits)
    return sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"initialization": "fixup"},
            (
                "model.arguments.initialization 'fixup' replaces normalization, got norm 'pre_ln'; "
                "set model.arguments.norm to no_norm"
            ),
        ),
        (
            {"initialization": "rezero", "norm": "deepnorm"},
            (
                "model.arguments.initialization 'rezero' replaces normalization, got norm 'deepnorm'; "
                "set model.arguments.norm to no_norm"
            ),
        ),
        (
            {"initialization": "mup"},
            (
                "model.arguments.base_width, the width whose settings are transferred, belongs to initialization 'mup' "
                "and to no other, got None with 'mup'"
            ),
        ),
        (
            {"base_width": 64},
            (
                "model.arguments.base_width, the width whose settings are transferred, belongs to initialization 'mup' "
                "and to no other, got 64 with 'published'"
            ),
        ),
        (
            {"initialization": "mup", "base_width": 0},
            "model.arguments.base_width must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_impossible_combinations_are_refused_in_one_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        gpt(**arguments)
    assert str(refusal.value) == message
