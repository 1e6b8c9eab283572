"""Each penalty against its formula written plainly, its slope against finite differences, and its manners."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rksp_core import KSSRegularizer
from rksp_core.errors import ConfigError, ModelError
from training.models.gpt import GPT
from training.models.kan import KAN
from training.models.mamba import Mamba
from training.models.moe import MoE
from training.models.vit import ViT
from training.schema.stabilizers import Stabilizers
from training.stabilizers import PENALTIES, apply_parametrizations, build_penalties

INPUTS = torch.randint(0, 32, (6, 8), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = INPUTS[:, 0]


def model(**arguments) -> GPT:
    """In float64, with updates that are not small: the initialization of torch."""
    torch.manual_seed(0)
    return GPT(32, 8, 16, **{"depth": 4, "heads": 2, "initialization": "torch", **arguments}).double()


def penalty(name: str, model: nn.Module, *, seed: int = 0, **settings):
    settings = {"weight": 2.0, "interval": 1, **settings}
    [built] = build_penalties(Stabilizers(**{name: settings}), model, seed)
    return built


def task_loss(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    logits = model(INPUTS[rows])[:, -1] if not isinstance(model, ViT) else model(IMAGES[rows])
    return functional.cross_entropy(logits, TARGETS[rows])


def term(penalty, model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    with penalty:
        return penalty.term(task_loss(model, rows))


def streams(model: GPT) -> list[torch.Tensor]:
    """h[0] .. h[L], by the model's own definition."""
    h = [model.token(INPUTS) + model.position(torch.arange(INPUTS.shape[1]))]
    for block in model.blocks:
        h.append(block(h[-1]))
    return h


def tail_loss(model: GPT, h: torch.Tensor, row: int) -> torch.Tensor:
    """The loss of one sequence as a function of its h[0]."""
    for block in model.blocks:
        h = block(h)
    return functional.cross_entropy(model.head(model.norm(h))[:, -1], TARGETS[row : row + 1])


def test_the_gradient_penalty_is_the_mean_squared_gradient_of_a_sequence():
    gpt = model()
    h0 = streams(gpt)[0].detach()
    squares = []
    for row in range(len(INPUTS)):
        own = h0[row : row + 1].clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (slope,) = torch.autograd.grad(tail_loss(gpt, own, row), own)
        squares.append(slope.square().sum())
    expected = 2.0 * torch.stack(squares).mean()
    torch.testing.assert_close(term(penalty("gradient_penalty", gpt), gpt), expected, rtol=1e-10, atol=0)


def test_residual_l2_is_the_mean_square_of_the_updates():
    gpt = model()
    h = streams(gpt)
    expected = 2.0 * torch.stack([(b - a).square().mean() for a, b in itertools.pairwise(h)]).mean()
    found = term(penalty("residual_l2", gpt, layer_fraction=1.0), gpt)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("target", ["input", "one"])
def test_the_activation_variance_is_that_of_a_token_over_its_features(target):
    gpt = model()
    v = [(h - h.mean(-1, keepdim=True)).square().mean(-1) for h in streams(gpt)]
    pairs = [(b - (a if target == "input" else 1.0)).square().mean() for a, b in itertools.pairwise(v)]
    found = term(penalty("activation_variance", gpt, layer_fraction=1.0, target=target), gpt)
    torch.testing.assert_close(found, 2.0 * torch.stack(pairs).mean(), rtol=1e-10, atol=0)


class Stack(nn.Module):
    """Blocks of a test's own around an embedding and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.token, self.blocks, self.head = nn.Embedding(32, 4), nn.ModuleList(blocks), nn.Linear(4, 32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.token(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def scaling(factor: float) -> nn.Module:
    block = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        block.weight.copy_(factor * torch.eye(4))
    return block


def test_the_jacobian_of_a_scaling_is_its_square_whatever_the_projection():
    stack = Stack(scaling(3.0)).double()
    for step in range(3):
        found = term(penalty("jacobian", stack, seed=step), stack).detach()
        assert float(found) == pytest.approx(2 * 9.0, rel=1e-12)


def test_the_jacobian_is_estimated_without_bias():
    """Of a block that mixes tokens, against the whole Jacobian; 300 projections, 4 standard errors."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    stack = Stack(block).double()
    h0 = stack.token(INPUTS[:2]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x), h0).reshape(h0.numel(), h0.numel())
    truth = float(jacobian.square().sum()) / h0.numel()
    with penalty("jacobian", stack, weight=1.0) as arm:
        draws = torch.stack([arm.term(stack(INPUTS[:2]).mean()).detach() for _ in range(300)])
    assert abs(float(draws.mean()) - truth) < 4 * float(draws.std()) / 300**0.5


MODELS = {
    "pre_ln": lambda: GPT(32, 8, 16, 2, 2, norm="pre_ln", initialization="torch"),
    "no_norm": lambda: GPT(32, 8, 16, 2, 2, norm="no_norm", initialization="torch"),
    "rmsnorm": lambda: GPT(32, 8, 16, 2, 2, norm="rmsnorm", initialization="torch"),
    "moe": lambda: MoE(32, 8, 16, 2, 2, experts=4, initialization="torch"),
    "mamba": lambda: Mamba(32, 8, 16, 2),
    "kan": lambda: KAN(32, 8, 16, 2, 2, initialization="torch"),
    "vit": lambda: ViT(8, 1, 32, patch=2, width=16, depth=2, heads=2, initialization="torch"),
}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", PENALTIES)
def test_the_slope_is_that_of_finite_differences(name, architecture):
    """For each architecture: two of the penalties differentiate it twice."""
    torch.manual_seed(0)
    gpt = MODELS[architecture]().double()
    parameters = list(gpt.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def move(distance: float) -> None:
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += distance * along

    def value() -> torch.Tensor:
        return term(penalty(name, gpt), gpt)

    slopes = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((s * along).sum()) for s, along in zip(slopes, direction, strict=True) if s is not None)
    step = 1e-6
    move(step)
    above = float(value().detach())
    move(-2 * step)
    below = float(value().detach())
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6)  # what h^2 f''' and rounding / h leave


@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "jacobian"])
def test_micro_batches_of_one_size_give_the_value_of_the_batch(name):
    gpt = model()
    arm = penalty(name, gpt)
    whole = term(arm, gpt)
    arm.load_state_dict({"steps": 0})
    with arm:
        parts = [arm.term(task_loss(gpt, slice(start, start + 2))) for start in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-10, atol=0)


def test_the_projections_differ_from_pass_to_pass_and_repeat_with_the_step():
    gpt = model()
    arm, again = penalty("jacobian", gpt), penalty("jacobian", gpt)
    with arm:
        first, second = (float(arm.term(task_loss(gpt)).detach()) for _ in range(2))
    third = float(term(arm, gpt).detach())
    assert len({first, second, third}) == 3
    assert float(term(again, gpt).detach()) == first
    again.load_state_dict(arm.state_dict() | {"steps": 1})
    assert float(term(again, gpt).detach()) == third


@pytest.mark.parametrize("name", ["residual_l2", "jacobian", "activation_variance"])
def test_the_blocks_are_those_that_kss_draws(name):
    gpt = model()
    arm, kss = penalty(name, gpt, seed=7, layer_fraction=0.5), KSSRegularizer(gpt, seed=7, layer_fraction=0.5)
    drawn = set()
    for step in range(6):
        arm.steps = kss.steps = step
        assert arm._chosen() == kss._chosen()
        drawn |= {block.name for block in arm._chosen()}
    assert len(drawn) == 4


@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_without_a_term_is_the_step_without_the_penalty(name):
    gpt = model()
    arm = penalty(name, gpt, interval=3)
    for step in range(7):
        with arm:
            assert any(module._forward_pre_hooks for module in gpt.modules()) == (step % 3 == 0)
            value = arm.term(task_loss(gpt))
        assert (float(value.detach()) > 0) == (step % 3 == 0)
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in gpt.modules())
    assert arm.state_dict() == {"steps": 7}


def test_the_random_state_stays_as_it_is():
    gpt = model()
    before = torch.get_rng_state()
    for name in PENALTIES:
        term(penalty(name, gpt), gpt).backward()
    assert torch.equal(torch.get_rng_state(), before)


def plain(_: GPT) -> None:
    pass


def checkpointed(gpt: GPT) -> None:
    for block in gpt.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compiled(gpt: GPT) -> None:
    gpt.compile(backend="aot_eager")


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("stabilizers", [{}, {"spectral_norm": {}}, {"weight_norm": {}}], ids=["plain", "s", "w"])
def test_checkpointing_changes_no_bit(name, stabilizers):
    assert gradients(name, plain, stabilizers) == gradients(name, checkpointed, stabilizers)


@pytest.mark.slow
def test_compiling_changes_no_bit():
    """Steps with a term run as written: the compiled graph could not be differentiated twice."""
    ways = [gradients("gradient_penalty", way, {"spectral_norm": {}}, depth=1) for way in (plain, compiled)]
    assert ways[0] == ways[1]


def gradients(name: str, prepare, stabilizers, **arguments) -> list[list[bytes]]:
    """Those of four steps, every second with a term, of two micro-batches each."""
    gpt = model(**arguments)
    apply_parametrizations(Stabilizers(**stabilizers), gpt)
    prepare(gpt)
    arm, found = penalty(name, gpt, interval=2), []
    for _ in range(4):
        gpt.zero_grad()
        with arm:
            for rows in (slice(0, 3), slice(3, 6)):
                loss = task_loss(gpt, rows)
                (loss + arm.term(loss)).backward()
        found.append([p.grad.numpy().tobytes() for p in gpt.parameters() if p.grad is not None])
    return found


def test_a_checkpoint_around_the_block_shows_it_twice_and_counts_once():
    """A user's own model may call `checkpoint(block, x)`: the hooks then run again in the backward pass."""

    class Around(GPT):
        def forward(self, input_ids):
            x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]))
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    around = Around(32, 8, 16, 4, 2, initialization="torch").double()
    gpt = model()
    arm, other = penalty("residual_l2", gpt), penalty("residual_l2", around)
    with arm, other:
        for rows in (slice(0, 3), slice(3, 6)):
            for guest, host in ((arm, gpt), (other, around)):
                loss = task_loss(host, rows)
                (loss + guest.term(loss)).backward()
    for one, two in zip(gpt.parameters(), around.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return x.mul_(2.0)


class Narrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([x, self.map(x)], dim=1)


def test_blocks_that_cannot_be_penalized_are_named():
    with pytest.raises(ModelError, match=r"block blocks.0 overwrites its input, which ResidualL2 needs"):
        term(penalty("residual_l2", stack := Stack(Overwriting())), stack)
    with pytest.raises(ModelError, match="ResidualL2 saw no block that returns a stream of the shape"):
        term(penalty("residual_l2", stack := Stack(Narrowing())), stack)


@pytest.mark.parametrize(
    ("stabilizers", "message"),
    [
        ({"residual_l2": {}}, "the key 'stabilizers.residual_l2.weight' is missing"),
        ({"jacobian": {"weight": 0}}, "stabilizers.jacobian.weight cannot be 0: it should be greater than 0"),
        ({"jacobian": {"weight": 1, "layer_fraction": 2}}, "stabilizers.jacobian.layer_fraction cannot be 2"),
        ({"gradient_penalty": {"weight": 1, "layer_fraction": 1}}, "unknown key 'stabilizers.gradient_penalty.layer_f"),
        ({"activation_varience": {"weight": 1}}, "did you mean 'stabilizers.activation_variance'?"),
        ({"activation_variance": {"weight": 1, "target": "two"}}, "it should be 'input' or 'one'"),
        ({"sam": {"roh": 1}}, "unknown key 'stabilizers.sam.roh'; did you mean 'stabilizers.sam.rho'?"),
        ({"weight_norm": {"dim": 1}}, "unknown key 'stabilizers.weight_norm.dim'"),
        ({"weight_norm": {}, "spectral_norm": {}}, "both normalize the matrices of the blocks; name one of them"),
    ],
)
def test_a_mistake_in_the_section_is_one_sentence(configure, stabilizers, message):
    with pytest.raises(ConfigError) as raised:
        configure(stabilizers=stabilizers)
    assert message in str(raised.value)
