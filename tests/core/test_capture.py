"""Finding the residual stream, sampling it, and leaving no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rksp_core import find_blocks, profile_model
from rksp_core.capture import capture, sample_positions
from rksp_core.errors import ModelError, NoBlocksError, ProbeError
from rksp_core.untouched import evaluating

WIDTH, VOCABULARY = 16, 50


class Block(nn.Module):
    """A residual block with dropout, batch statistics, a tuple output and keyword input, as they come in the wild."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.in_place = in_place

    def forward(self, hidden_states: Tensor, extra: int = 0) -> tuple[Tensor, int]:
        update = self.dropout(torch.tanh(self.linear(hidden_states)))
        if self.in_place:
            hidden_states += update
            return hidden_states, extra
        return hidden_states + update, extra


class Model(nn.Module):
    def __init__(self, depth: int = 3, *, in_place: bool = False, keyword: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(in_place=in_place) for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.keyword = keyword

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h, _ = layer(hidden_states=h) if self.keyword else layer(h)
        return self.head(h)


def tokens(sequences: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


class TestFindBlocks:
    def test_a_module_list(self, model: Model) -> None:
        assert [block.name for block in find_blocks(model)] == ["layers.0", "layers.1", "layers.2"]

    def test_a_glob_stays_within_a_name_part(self, model: Model) -> None:
        assert [block.name for block in find_blocks(model, "layers.*")] == ["layers.0", "layers.1", "layers.2"]
        assert [block.name for block in find_blocks(model, ["layers.0", "layers.2"])] == ["layers.0", "layers.2"]

    def test_no_match_lists_the_candidates(self, model: Model) -> None:
        with pytest.raises(NoBlocksError, match=r"no module is called h\.\*.*candidates: layers\.\*"):
            find_blocks(model, "h.*")
        with pytest.raises(NoBlocksError, match="candidates: none at all"):
            find_blocks(nn.Linear(2, 2))

    def test_a_list_inside_a_block_belongs_to_the_block(self) -> None:
        """A mixture of experts has more parameters in its experts than a layer list has anywhere else."""

        class Expert(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

        model = nn.Module()
        model.blocks = nn.ModuleList([Expert(), Expert()])
        model.heads = nn.ModuleList([nn.Linear(2, 2)])
        assert [block.name for block in find_blocks(model)] == ["blocks.0", "blocks.1"]

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_torch_transformer_encoder(self, batch_first: bool) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=batch_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        stream = torch.randn(6, 9, WIDTH) if batch_first else torch.randn(9, 6, WIDTH)
        profile = profile_model(encoder, stream)
        assert [layer.layer for layer in profile.layers] == ["layers.0", "layers.1"]
        assert profile.layers[0].samples == 54

    @pytest.mark.parametrize(
        ("name", "first", "options"),
        [
            ("gpt2", "transformer.h.0", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}),
            ("llama", "model.layers.0", {}),
            ("mixtral", "model.layers.0", {"num_local_experts": 4}),
            ("bert", "encoder.layer.0", {}),
            ("mamba", "backbone.layers.0", {}),
            ("gpt_neox", "gpt_neox.layers.0", {}),
        ],
    )
    def test_hugging_face(self, name: str, first: str, options: dict[str, int]) -> None:
        transformers = pytest.importorskip("transformers")
        small = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
        }
        config = transformers.AutoConfig.for_model(name, **(options if name == "gpt2" else small | options))
        family = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        model = family.from_config(config)
        profile = profile_model(model, {"input_ids": tokens()}, samples=96)
        assert profile.layers[0].layer == first
        assert len(profile.layers) == 2
        assert profile.layers[0].samples == 96


def test_samples_are_seeded_and_respect_the_padding() -> None:
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:, :5] = True
    chosen = sample_positions(8, 12, mask, 30, seed=1)
    assert int(chosen.sum()) == 30
    assert not bool((chosen & ~mask).any())
    assert bool((chosen == sample_positions(8, 12, mask, 30, seed=1)).all())
    assert not bool((chosen == sample_positions(8, 12, mask, 30, seed=2)).all())
    assert int(sample_positions(8, 12, mask, 1000, seed=1).sum()) == 40


def test_padding_never_reaches_the_moments(model: Model) -> None:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    other = ids.clone()
    other[:, 6:] = 0
    one = capture(model, {"input_ids": ids, "attention_mask": mask})
    two = capture(model, {"input_ids": other, "attention_mask": mask})
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a.count == 48
        torch.testing.assert_close(a.second, b.second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_padding_of_a_torch_encoder_is_respected_in_both_layouts(batch_first: bool) -> None:
    """Left to itself the encoder passes nested tensors between its layers when it is given padding."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    stream, padding = torch.randn(6, 9, WIDTH), torch.zeros(6, 9, dtype=torch.bool)
    padding[:, 5:] = True
    batch = {"src": stream if batch_first else stream.transpose(0, 1), "src_key_padding_mask": padding}
    (_, first), _ = capture(encoder, batch)
    kept = stream[:, :5].flatten(0, 1).double()
    torch.testing.assert_close(first.mean[0], kept.mean(0), rtol=1e-12, atol=1e-12)
    assert first.count == len(kept)


def test_an_encoders_padding_says_nothing_about_the_decoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    mask = torch.ones_like(tokens())
    mask[:, 5:] = 0
    batch = {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens()}
    assert [moments.count for _, moments in capture(model, batch)] == [96, 96]
    assert [moments.count for _, moments in capture(model, batch, blocks="encoder.block.*")] == [40, 40]
    own = mask.clone()
    own[:, 7:] = 1
    counts = [moments.count for _, moments in capture(model, batch | {"decoder_attention_mask": own})]
    assert counts == [80, 80]


def test_the_batch_may_say_use_cache_itself() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    assert len(capture(model, {"input_ids": tokens(), "use_cache": False})) == 2


def test_a_block_may_return_a_wider_dtype_than_it_takes() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((), 1e5))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() * self.weight

    model = nn.Sequential(Widening())
    stream = torch.randn(4, 8, WIDTH).half()
    ((_, moments),) = capture(model, stream)
    assert moments.finite
    torch.testing.assert_close(moments.mean[1], 1e5 * moments.mean[0], rtol=1e-6, atol=0.0)  # the product is float32


def test_moments_are_those_of_the_streams(model: Model) -> None:
    """Against states taken by hand, block by block."""
    model.eval()
    with torch.no_grad():
        h = [model.embed(tokens())]
        for layer in model.layers:
            h.append(layer(h[-1])[0])
    for index, (_, moments) in enumerate(capture(model, tokens())):
        x, y = (state.flatten(0, 1).double() for state in h[index : index + 2])
        xc, yc = x - x.mean(0), y - y.mean(0)
        torch.testing.assert_close(moments.second, torch.stack([xc.T @ xc, yc.T @ xc, yc.T @ yc]))


@pytest.mark.parametrize("options", [{"in_place": True}, {"keyword": True}, {"in_place": True, "keyword": True}])
def test_in_place_blocks_and_keyword_inputs_give_the_same(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    plain = Model()
    other = Model(**options)
    other.load_state_dict(plain.state_dict())
    for (_, a), (_, b) in zip(capture(plain, tokens()), capture(other, tokens()), strict=True):
        torch.testing.assert_close(a.second, b.second)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_see_the_same_positions(model: Model, size: int) -> None:
    whole = capture(model, tokens(), samples=40)
    parts = capture(model, tokens(), samples=40, micro_batch=size)
    for (_, a), (_, b) in zip(whole, parts, strict=True):
        assert a.count == b.count == 40
        # A float32 product may be blocked differently for another batch size.
        torch.testing.assert_close(a.second, b.second, rtol=1e-4, atol=1e-5)


def test_the_forward_pass_ends_behind_the_last_block(model: Model) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the logits are the largest tensor of all, and nobody asked for them")

    handle = model.head.register_forward_pre_hook(never)
    capture(model, tokens())
    handle.remove()


def test_capturing_leaves_no_trace(model: Model) -> None:
    model.train()
    model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    profile_model(model, tokens())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.layers] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_draws_numbers_leaves_every_random_state_as_it_was(model: Model) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with evaluating(model):
        torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_hooks_go_even_when_the_model_raises(model: Model) -> None:
    model.layers[1].linear = nn.Linear(WIDTH + 1, WIDTH)
    with pytest.raises(ModelError, match=r"Model raised RuntimeError on the probe \(.*\); check that the probe fits"):
        capture(model, tokens())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_training_with_profiles_is_bitwise_the_same_as_without() -> None:
    def train(observe: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            if observe:
                profile_model(model, tokens(), samples=50)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten())
            loss.backward()
            optimizer.step()
        return model.state_dict()

    plain, observed = train(False), train(True)
    assert all(torch.equal(plain[name], observed[name]) for name in plain)


def test_blocks_that_change_the_shape_are_refused() -> None:
    model = nn.Module()
    model.stack = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 4)])
    model.forward = lambda x: model.stack[1](model.stack[0](x))
    with pytest.raises(ModelError, match=r"block stack\.0 changes the shape of the stream"):
        capture(model, torch.randn(3, 2, 4))


def test_blocks_that_do_not_run_are_refused(model: Model) -> None:
    model.unused = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(ModelError, match=r"did not run unused\.0"):
        capture(model, tokens(), blocks=["layers.*", "unused.*"])


def test_a_compiled_model_is_profiled_as_its_original(model: Model) -> None:
    compiled = torch.compile(model, backend="eager")
    a, b = profile_model(model, tokens()), profile_model(compiled, tokens())
    assert a.to_dict() == b.to_dict()


def test_a_model_compiled_in_place_is_profiled_as_its_original() -> None:
    """Its graph was traced without hooks, and may not be broken for them."""
    torch.manual_seed(0)
    plain, compiled = Model(2), Model(2)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="eager", fullgraph=True)
    compiled.eval()(tokens())
    assert profile_model(compiled, tokens()).to_dict() == profile_model(plain, tokens()).to_dict()


def test_nothing_to_profile_is_one_clear_sentence(model: Model) -> None:
    with pytest.raises(NoBlocksError, match="candidates: layers"):
        capture(model, tokens(), blocks=[])
    with pytest.raises(ProbeError, match="holds no sequence"):
        capture(model, tokens(0))
