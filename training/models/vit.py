"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): GPT's blocks over image patches, both ways.

Shapes: B images of C channels and size S x S, P = patch size, T = (S/P)^2 patches, and one token more for the class;
d = width, K = classes. ``ViT.blocks`` holds the layers of the profile.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rksp_core.errors import ConfigError
from training.models.arguments import check_counts
from training.models.gpt import MLP, Attention, Block
from training.models.initialization import Initialization, Readout
from training.names import choose

POOLINGS = ("class", "mean")


class ViT(nn.Module):
    """Patch and position embedding, ``depth`` blocks, final norm, head.

    Parameters
    ----------
    image, channels, classes
        Height and width S of an image in pixels, its channels, and the number of classes.
    patch
        P, a divisor of S: 16 at 224, 4 at 32 or 28, 2 at 8.
    width, depth, heads
        As for `training.models.gpt.GPT`; 192, 6, 3 is the ViT-Tiny of Kim et al. 2026, Table 9.
    norm, initialization, base_width
        As for `training.models.gpt.GPT`.
    pooling
        What the head reads: ``class``, a learned token in front of the patches (as published), or ``mean``, the mean
        over the patches, without such a token (App. D.3).

    Raises
    ------
    ConfigError
        When an argument is out of its range, or two do not go together.
    """

    def __init__(
        self,
        image: int,
        channels: int,
        classes: int,
        patch: int = 16,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        norm: str = "pre_ln",
        initialization: str = "published",
        base_width: int | None = None,
        pooling: str = "class",
    ) -> None:
        super().__init__()
        check_counts(image=image, channels=channels, classes=classes, patch=patch)
        check_counts(width=width, depth=depth, heads=heads)
        if image % patch:
            raise ConfigError(
                f"model.arguments.patch must divide image, got patches of {patch} for image {image}; choose a divisor"
            )
        choose(pooling, POOLINGS, "model.arguments.pooling")
        start = Initialization.of(initialization, norm, depth, width, base_width)
        self.image, self.channels, self.classes = image, channels, classes
        self.patch = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pooling == "class" else None
        self.position = nn.Embedding((image // patch) ** 2 + (pooling == "class"), width)
        self.blocks = nn.ModuleList(
            Block(width, start, Attention(width, heads, start, causal=False), MLP(width, start)) for _ in range(depth)
        )
        self.norm = start.residual.final(width)
        self.head = Readout(width, classes, start.shrink, bias=True)
        start.fill(self)
        self._factors = start.learning_rate_factors(self)  # now, before the names of parametrized matrices change

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, K) for images (B, C, S, S)."""
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)  # (B, T, d), rows of patches from top left
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + T, d)
        x = x + self.position.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])  # (B, K)

    def learning_rate_factors(self) -> dict[str, float]:
        """Return {parameter name: factor of the learning rate}; empty except in muP."""
        return dict(self._factors)
