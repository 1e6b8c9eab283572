"""A small GPT-like model, given to the monitor by its factory string, and variants that misbehave."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

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


_LEAKED: list[Tensor] = []


class _Scripted(Tiny):
    """Does what the weights say: the checkpoint is what kills the worker, hangs it, leaks or takes all memory."""

    def forward(self, tokens: Tensor) -> Tensor:
        code = float(self.blocks[0].down.bias[0])
        if code == 9.0:
            os.kill(os.getpid(), 9)
        if code == 7.0:
            time.sleep(3600)
        if code == 6.0:
            _LEAKED.append(torch.ones(2**26))  # 256 MiB
        while code == 5.0:
            _LEAKED.append(torch.ones(2**24))  # 64 MiB at a time, without end
            time.sleep(0.01)
        return super().forward(tokens)


def build_scripted() -> nn.Module:
    return _Scripted()


class _Hungry(Tiny):
    """Runs out of memory on more than ``most`` sequences, and on any before it has been moved ``moves`` times."""

    def __init__(self, most: int, moves: int) -> None:
        super().__init__()
        self.most, self.moves = most, moves

    def to(self, *args: Any, **kwargs: Any) -> _Hungry:
        self.moves -= 1
        return super().to(*args, **kwargs)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[0] > self.most or self.moves > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(tokens)


def build_hungry(most: int = 32, moves: int = 0) -> nn.Module:
    """Build a model of float64, so that micro-batches differ in their order of summation only."""
    return _Hungry(most, moves).double()


class _Drifting(Tiny):
    """Remembers what it saw, in a buffer that no checkpoint holds, and draws random numbers: both reach the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.seen
        self.seen += 1
        for block in self.blocks:
            h = block(h) + 0.01 * torch.randn_like(h)
        return self.head(h)


def build_drifting() -> nn.Module:
    return _Drifting()


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
