"""A vision transformer: its patches, its two poolings, its sizes."""

from __future__ import annotations

import pytest
import torch

from training.models.gpt import Attention
from training.models.initialization import Initialization
from training.models.norms import PreLN
from training.models.vit import ViT


def vit(image: int, patch: int, channels: int = 3, **arguments: object) -> ViT:
    torch.manual_seed(0)
    sizes = {"classes": 5, "width": 16, "depth": 2, "heads": 2}
    return ViT(image=image, channels=channels, patch=patch, **sizes | arguments)


@pytest.mark.parametrize(
    ("image", "patch", "channels", "patches"),
    [(224, 16, 3, 196), (32, 4, 3, 64), (28, 4, 1, 49), (28, 7, 1, 16), (8, 2, 1, 16), (8, 8, 1, 1)],
)
def test_images_of_all_sizes(image, patch, channels, patches):
    model = vit(image, patch, channels)
    seen = []
    model.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    assert model(torch.randn(2, channels, image, image)).shape == (2, 5)
    assert seen == [(2, 1 + patches, 16)]


def test_a_patch_is_a_linear_map_of_its_pixels():
    model, images = vit(8, 4).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    weight = model.patch.weight.view(16, -1)
    for number, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels = images[:, :, row : row + 4, column : column + 4].flatten(1)
        expected = pixels @ weight.T + model.patch.bias + model.position.weight[1 + number]
        torch.testing.assert_close(seen[0][:, 1 + number], expected, rtol=1e-10, atol=1e-14)
    first = (model.class_token[0, 0] + model.position.weight[0]).expand(2, -1)
    torch.testing.assert_close(seen[0][:, 0], first, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_the_head_reads_the_class_token_or_the_mean(pooling):
    model, images = vit(8, 4, pooling=pooling), torch.randn(2, 3, 8, 8)
    seen = []
    model.norm.register_forward_hook(lambda _, inputs, output: seen.append(output))
    logits = model(images)
    assert seen[0].shape == (2, 4 + (pooling == "class"), 16)
    read = seen[0][:, 0] if pooling == "class" else seen[0].mean(1)
    torch.testing.assert_close(logits, read @ model.head.weight.T + model.head.bias)


def test_attention_goes_both_ways():
    torch.manual_seed(0)
    attention = Attention(16, 2, Initialization("published", PreLN, 2), causal=False).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    q, k, v = (f(x).view(3, 5, 2, 8).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    mixed = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(3, 5, 16)
    torch.testing.assert_close(attention(x), attention.output(mixed), rtol=1e-10, atol=1e-14)
