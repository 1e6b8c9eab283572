"""What the examples train on: the bytes of a text, cut into windows. No download, no tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

TEXT = Path(__file__).parents[1] / "LICENSE"


def windows(path: Path, length: int) -> Tensor:
    """Return the text as (windows, length) byte values; what is left at the end is dropped."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    return data[: len(data) // length * length].reshape(-1, length)


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line that the examples share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="the run folder, which `rksp watch` is given, too")
    parser.add_argument("--text", type=Path, default=TEXT, help="any file; its bytes are the tokens")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile-every", type=int, default=20)
    return parser.parse_args()


class ByteModel(nn.Module):
    """A small causal transformer over bytes: (sequences, length) -> logits (sequences, length, 256)."""

    def __init__(self, length: int, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layers = (
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(width, 256)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits of each next byte."""
        h = self.tokens(input_ids) + self.positions  # (sequences, length, width)
        for block in self.blocks:
            h = block(h, src_mask=self.causal, is_causal=True)
        return self.head(h)


def next_byte_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of each byte given those before it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
