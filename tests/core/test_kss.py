"""KSS: the printed formula, gradients that gradcheck accepts, and a regularizer that only acts when it is due."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rksp_core import KSSRegularizer, KSSSettings, kss_loss
from rksp_core.kss import CONDITION_LIMIT, VARIANTS, Variant, eigenvalue_moduli
from rksp_core.orders import Levers

from .planted import random_operator, snapshots
from .test_capture import Model, tokens


def penalty(moduli: np.ndarray, variant: str, gamma: float = 0.4) -> float:
    """Kim et al. 2026, Eq. 14, as printed."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    over = moduli - 1.05
    soft = np.mean(sigmoid(20 * (moduli - 0.90)) * sigmoid(20 * (1.05 - moduli)))
    paper = np.sum(sigmoid(20 * over) * np.log1p(np.exp(over)) ** 2)
    hinge = np.sum(np.maximum(over, 0) ** 2)
    return float((paper if variant == "paper" else hinge) + (soft - gamma) ** 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_equation_14_on_planted_eigenvalues(variant: Variant) -> None:
    planted = random_operator(10, radius=1.3)
    x, y = snapshots(planted, 200)
    expected = penalty(torch.linalg.eigvals(planted).abs().numpy(), variant)
    assert float(kss_loss(x, y, rank=32, variant=variant)) == pytest.approx(expected, rel=1e-9)


def test_a_hinge_leaves_near_unit_modes_alone_and_the_published_form_does_not() -> None:
    """softplus(x)^2 sigmoid(20 x) is .12 at |lam| = 1, for every one of the r modes."""
    x = torch.randn(100, 8, dtype=torch.float64)
    assert float(kss_loss(x, x, variant="hinge")) == pytest.approx(penalty(np.ones(8), "hinge"), rel=1e-9)
    unstable = float(kss_loss(x, x, beta=0.0))
    assert unstable == pytest.approx(8 * 0.12, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [3, 8])
def test_gradcheck(variant: Variant, rank: int) -> None:
    x, y = snapshots(random_operator(6, radius=1.3), 20, noise=0.3)
    full = rank >= x.shape[1]
    # U is detached: with r < d the loss as a function of h_in moves U too, so only h_out is checked there.
    x.requires_grad_(full)
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kss_loss(a, b, rank=rank, variant=variant), (x, y))


def test_moduli_gradient_agrees_with_torch_on_well_conditioned_matrices() -> None:
    matrix = random_operator(32).requires_grad_()
    weights = torch.linspace(-1, 1, 32, dtype=torch.float64)
    (mine,) = torch.autograd.grad((eigenvalue_moduli(matrix).sort().values * weights).sum(), matrix)
    (theirs,) = torch.autograd.grad((torch.linalg.eigvals(matrix).abs().sort().values * weights).sum(), matrix)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_nearly_defective_pair_is_cut() -> None:
    """[[1, 1], [g, 1]] has eigenvalues 1 +- sqrt(g) and a derivative of order 1/sqrt(g): noise below some gap."""
    for gap in (1e-4, 1e-9, 1e-14):
        matrix = torch.tensor([[1.0, 1.0], [gap, 1.0]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(eigenvalue_moduli(matrix)[0], matrix)
        assert gradient.abs().max() <= CONDITION_LIMIT


def test_a_defective_operator_has_no_derivative() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        eigenvalue_moduli(
            torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
        ).sum().backward()


class TestRegularizer:
    @staticmethod
    def model() -> Model:
        torch.manual_seed(0)
        return Model(4).double().eval()

    def test_the_term_and_its_gradient_are_those_of_kss_loss(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, alpha=0.3, interval=1, layer_fraction=1.0, rank=8)
        with regularizer:
            model(tokens())
        regularizer.term().backward()
        mine = [p.grad.clone() for p in model.layers.parameters()]
        model.zero_grad()
        h, total = model.embed(tokens()), 0.0
        for layer in model.layers:
            out = layer(h)[0]
            total = total + kss_loss(h.flatten(0, 1), out.flatten(0, 1), rank=8)
            h = out
        (0.3 * total / 4).backward()
        for a, b in zip(mine, (p.grad for p in model.layers.parameters()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def test_is_due_every_interval_on_a_share_of_the_layers(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, alpha=0.1, interval=3, layer_fraction=0.5)
        terms = []
        for _ in range(7):
            with regularizer:
                hooked = sum(len(block._forward_hooks) for block in model.layers)
                model(tokens())
            terms.append((hooked, regularizer.term().item() > 0))
        assert terms == [(2, True), (0, False), (0, False), (2, True), (0, False), (0, False), (2, True)]
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)

    def test_weight_zero_is_bitwise_nothing(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, alpha=0.0, interval=1)
        with regularizer:
            loss = model(tokens()).square().mean()
        assert torch.equal(loss + regularizer.term(), loss)

    def test_a_resumed_run_draws_the_same_layers(self) -> None:
        def draws(regularizer: KSSRegularizer, steps: int) -> list[list[str]]:
            names = []
            for _ in range(steps):
                names.append([block.name for block in regularizer._chosen()])
                with regularizer:
                    pass
            return names

        straight = KSSRegularizer(self.model(), interval=1)
        expected = draws(straight, 8)
        first, second = KSSRegularizer(self.model(), interval=1), KSSRegularizer(self.model(), alpha=9.0)
        got = draws(first, 5)
        second.load_state_dict(first.state_dict())
        assert got + draws(second, 3) == expected
        assert second.settings == first.settings

    def test_configure_holds_from_the_next_step(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, alpha=0.0)
        regularizer.configure(KSSSettings(alpha=0.2, interval=1, layer_fraction=1.0))
        with regularizer:
            model(tokens())
        assert regularizer.term().item() > 0

    def test_an_order_s_levers_leave_a_state_that_can_be_restored(self) -> None:
        regularizer, restored = KSSRegularizer(self.model()), KSSRegularizer(self.model())
        regularizer.configure(Levers(alpha=0.2, clip=0.5))
        restored.load_state_dict(regularizer.state_dict())
        assert restored.settings == KSSSettings(alpha=0.2)

    @pytest.mark.gpu
    def test_blocks_on_two_devices_give_the_term_of_one(self) -> None:
        """As under Hugging Face's ``device_map``, which moves a block's input inside of the block."""
        terms = []
        for second in ("cpu", "cuda"):
            model = self.model()
            for layer in list(model.layers)[2:]:
                forward = layer.to(second).forward
                layer.forward = lambda h, forward=forward, second=second: forward(h.to(second))
            model.head.to(second)
            regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
            with regularizer:
                model(tokens())
            terms.append(regularizer.term().item())
        assert terms[0] == pytest.approx(terms[1], rel=1e-9)

    def test_a_layer_that_cannot_be_differentiated_is_skipped_and_counted(self) -> None:
        model = self.model()
        with torch.no_grad():
            model.embed.weight.fill_(1.0)  # every token alike: no direction varies
        regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
        with regularizer:
            model(tokens())
        assert regularizer.term().item() == 0.0
        assert regularizer.skipped_layers == 4

    def test_hooks_go_when_the_forward_pass_raises(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, interval=1)
        with pytest.raises(IndexError), regularizer:
            model(torch.tensor([[10**6]]))
        assert not any(block._forward_hooks for block in model.layers)


class Checkpointed(Model):
    """Recomputes each block in the backward pass, as trainers do to save memory."""

    reentrant = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h, _ = checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.head(h)


class TestRegularizerInTraining:
    """What trainers do around a forward pass must not change the term, and must never end the run."""

    @staticmethod
    def run(model: nn.Module, regularizer: KSSRegularizer, forward: nn.Module | None = None) -> list[Tensor]:
        with regularizer:
            loss = (model if forward is None else forward)(tokens()).float().square().mean()
        (loss + regularizer.term()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    @staticmethod
    def model(kind: type[Model] = Model) -> Model:
        torch.manual_seed(0)
        return kind(3).eval()

    def test_recomputed_blocks_give_the_same_gradient(self) -> None:
        plain, recomputed = self.model(), self.model(Checkpointed)
        expected = self.run(plain, KSSRegularizer(plain, interval=1, layer_fraction=1.0))
        got = self.run(recomputed, KSSRegularizer(recomputed, interval=1, layer_fraction=1.0))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # float32

    def test_a_stream_without_gradient_is_skipped_and_counted(self) -> None:
        """Reentrant checkpoints run the blocks under no_grad: a term there would reach no parameter."""
        model = self.model(Checkpointed)
        model.reentrant = True
        regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
        with regularizer:
            model(tokens())
        assert regularizer.term().item() == 0.0
        assert regularizer.skipped_layers == 3

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_layer_that_blows_up_is_skipped_and_counted(self, bad: float) -> None:
        model = self.model()
        with torch.no_grad():
            model.layers[-1].linear.bias[0] = bad
            model.layers[-1].forward = lambda h: (h + bad, 0)
        regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
        with regularizer:
            model(tokens())
        assert math.isfinite(regularizer.term().item())
        assert regularizer.skipped_layers == 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_slope_is_not_rounded_to_the_dtype_of_a_half_precision_model(self, dtype: torch.dtype) -> None:
        """A small weight times a slope is far below float16's 6e-8; it is scaled up only in the backward pass."""
        model = self.model().to(dtype)
        regularizer = KSSRegularizer(model, alpha=1e-6, interval=1, layer_fraction=1.0)
        with regularizer:
            model(tokens())
        term = regularizer.term()
        assert term.dtype == torch.float32
        (term * 1e6).backward()
        scaled = [parameter.grad.clone() for parameter in model.layers.parameters()]
        model.zero_grad()
        regularizer.configure(KSSSettings(alpha=1.0, interval=1, layer_fraction=1.0))
        regularizer.steps = 0
        with regularizer:
            model(tokens())
        regularizer.term().backward()
        for a, b in zip(scaled, (parameter.grad for parameter in model.layers.parameters()), strict=True):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            assert float(b.abs().max()) > 0

    def test_a_block_recomputed_inside_the_context_counts_once(self) -> None:
        """A backward pass in the context runs checkpointed blocks, and so their hooks, once more."""
        plain, recomputed = self.model(), self.model(Checkpointed)
        expected = self.run(plain, KSSRegularizer(plain, interval=1, layer_fraction=1.0))
        regularizer = KSSRegularizer(recomputed, interval=1, layer_fraction=1.0)
        with regularizer, set_checkpoint_early_stop(False):
            (recomputed(tokens()).square().mean() + regularizer.term()).backward()
            assert regularizer.term().item() == 0.0
        assert regularizer.skipped_layers == 0
        for a, b in zip(expected, (parameter.grad for parameter in recomputed.parameters()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # float32

    @pytest.mark.parametrize("through", ["the model", "a module in it"])
    def test_padding_stays_out_whoever_is_called_with_the_mask(self, through: str) -> None:
        """A trainer may call the network inside of what it was given; the mask of the last call goes with that call."""
        inner = self.model()
        outer = nn.Module()
        outer.network = inner
        mask = torch.arange(12).expand(8, 12) < 9
        terms = []
        for ids, given in ((tokens()[:, :9], None), (tokens(), mask.long()), (tokens(), None)):
            regularizer = KSSRegularizer(inner if through == "the model" else outer, interval=1, layer_fraction=1.0)
            with regularizer:
                inner(tokens(), attention_mask=mask.long())
                regularizer.term()
                inner(ids, attention_mask=given)
            terms.append(regularizer.term().item())
        assert terms[0] == pytest.approx(terms[1], rel=1e-6)  # float32
        assert terms[0] != pytest.approx(terms[2], rel=1e-3)

    def test_padding_stays_out_of_a_stream_with_its_positions_first(self) -> None:
        """As in `nn.TransformerEncoder`, whose mask has its sequences first all the same."""
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0), 2, enable_nested_tensor=False
        )
        h, padding = torch.randn(12, 5, 16), torch.arange(12).expand(5, 12) >= 9
        terms = []
        for stream, given in ((h[:9], None), (h, padding), (h, None)):
            regularizer = KSSRegularizer(encoder, interval=1, layer_fraction=1.0)
            with regularizer:
                encoder(stream, src_key_padding_mask=given)
            terms.append(regularizer.term().item())
        assert terms[0] == pytest.approx(terms[1], rel=1e-5)  # float32
        assert terms[0] != pytest.approx(terms[2], rel=1e-3)

    def test_the_mask_of_an_encoder_leaves_the_decoder_alone(self) -> None:
        """Also where both have the same length, and the decoder's tokens come without a mask."""

        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Model(3)

            def forward(self, ids: Tensor, encoder_hidden_states: Tensor) -> Tensor:
                return self.inner(ids)

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.decoder = Decoder().eval()

            def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                return self.decoder(ids, encoder_hidden_states=torch.zeros(8, 12, 16))

        terms = []
        for given in (None, torch.arange(12).expand(8, 12) < 9):
            model = Both()
            regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
            with regularizer:
                model(tokens(), attention_mask=given)
            terms.append(regularizer.term().item())
        assert terms[0] == terms[1]

    def test_an_evaluation_by_one_process_alone_waits_for_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
        monkeypatch.setattr(regularizer, "_sum", lambda _: pytest.fail("a collective"))
        with regularizer, torch.no_grad():
            model(tokens())
        assert regularizer.term().item() == 0.0
        assert regularizer.skipped_layers == 3

    def test_two_forward_passes_in_one_context_are_averaged(self) -> None:
        model = self.model()
        regularizer = KSSRegularizer(model, interval=1, layer_fraction=1.0)
        terms = []
        for batches in ([tokens()], [tokens().flip(0, 1)], [tokens(), tokens().flip(0, 1)]):
            regularizer.steps = 0
            with regularizer:
                for batch in batches:
                    model(batch)
            terms.append(regularizer.term().item())
        assert terms[2] == pytest.approx((terms[0] + terms[1]) / 2, rel=1e-6)  # float32

    def test_a_compiled_model_is_not_traced_anew_for_the_hooks(self) -> None:
        plain, model = self.model(), self.model()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        expected = self.run(plain, KSSRegularizer(plain, interval=1, layer_fraction=1.0))
        got = self.run(model, KSSRegularizer(compiled, interval=1, layer_fraction=1.0), compiled)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # float32


def test_one_token_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        kss_loss(torch.zeros(1, 4), torch.zeros(1, 4))


def test_a_rank_of_nothing_is_refused_before_the_training_starts() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        KSSRegularizer(Model(1), rank=0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        kss_loss(torch.randn(8, 4), torch.randn(8, 4), rank=0)


class Padded(Model):
    """Takes its mask as a keyword argument, as Hugging Face models do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(input_ids)


def test_padding_stays_out_of_the_term() -> None:
    """The blocks of this model mix no tokens, so the padded batch has the term of its real tokens alone."""
    torch.manual_seed(0)
    model = Padded(4).double().eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] // 2 :] = 0
    regularizer = KSSRegularizer(model, alpha=0.3, interval=1, layer_fraction=1.0, rank=8)
    terms = []
    for keywords in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, : ids.shape[1] // 2]}):
        with regularizer:
            model(**keywords)
        terms.append(regularizer.term().item())
    with regularizer:
        model(ids)
    assert terms[0] == pytest.approx(terms[1], rel=1e-12)
    assert regularizer.term().item() != pytest.approx(terms[0], rel=1e-3)


def test_an_order_may_set_another_variant_and_its_end_restores_the_own_one() -> None:
    torch.manual_seed(0)
    model = Model(4).double().eval()
    regularizer = KSSRegularizer(model, alpha=0.3, interval=1, layer_fraction=1.0, rank=8)

    def term(variant: Variant | None) -> float:
        regularizer.configure(KSSSettings(0.3, 1, 1.0, variant=variant))
        with regularizer:
            model(tokens())
        return regularizer.term().item()

    own, hinge, again = term(None), term("hinge"), term(None)
    assert own == again
    assert hinge < 0.9 * own
