"""A small GPT-like model, given to the monitor by its factory string, and variants that misbehave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.relu(self.up(self.norm(h))))


class Tiny(nn.Module):
    """Tokens (sequences, length) -> logits (sequences, length, vocabulary)."""

    def __init__(self, vocabulary: int = 32, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def build(width: int = 16, depth: int = 3) -> nn.Module:
    return Tiny(width=width, depth=depth)


class _Scripted(Tiny):
    """Dies or hangs when the weights say so: the checkpoint is what kills the worker."""

    def forward(self, tokens: Tensor) -> Tensor:
        code = float(self.blocks[0].down.bias[0])
        if code == 9.0:
            os.kill(os.getpid(), 9)
        if code == 7.0:
            time.sleep(3600)
        return super().forward(tokens)


def build_scripted() -> nn.Module:
    return _Scripted()


def weights(step: int, code: float | None = None, scale: float = 1.0, width: int = 16) -> dict[str, Tensor]:
    """Return a state dict that differs from step to step; the tied head is stored once, as safetensors wants."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        state = build(width).state_dict()
    del state["head.weight"]
    state["blocks.1.down.weight"] = state["blocks.1.down.weight"] * scale
    if code is not None:
        state["blocks.0.down.bias"][0] = code
    return state


def save_folder(run: Path, step: int, **options: float) -> Path:
    """Write checkpoints/step-N as the bundled trainer does: filled under a dot name, then renamed."""
    from safetensors.torch import save_file

    staging = run / "checkpoints" / f".step-{step:08d}.tmp"
    staging.mkdir(parents=True)
    save_file(weights(step, **options), staging / "model.safetensors")
    (staging / "checkpoint.json").write_text(json.dumps({"schema": "rksp.checkpoint/1", "step": step}))
    return staging.rename(run / "checkpoints" / f"step-{step:08d}")
