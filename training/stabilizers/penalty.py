"""The base of the penalties: terms that are added to the loss of a step and read the residual stream of some blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rksp_core.capture import Block, draw_blocks, find_blocks, stream_of, stream_out, uncompiled
from rksp_core.errors import ModelError
from rksp_core.kss import step_generator
from rksp_core.untouched import as_written

Pair = tuple[Tensor, Tensor]  # h_in, h_out of a block, each (B, T, d)


class Penalty(ABC):
    """Adds ``weight`` times `measure` to the loss, every ``interval`` steps, on a random share of the blocks.

        with penalty:
            for inputs, targets in micro_batches:
                loss = task_loss(model(inputs), targets)
                (loss + penalty.term(loss)).backward()

    Each entry of the context counts one step; hooks are on only inside it, and only while a term is due. The blocks are
    a function of (seed, step), and those that `rksp_core.KSSRegularizer` draws. Compiled models run as written while a
    term is due. Terms are means over the tokens or sequences of a process; averaged over processes and micro-batches of
    one size they are the value of the whole batch.

    Parameters
    ----------
    model
        The model whose forward pass runs inside the context; behind a wrapper such as DDP, the model itself.
    weight
        Above 0.
    interval
        Steps from one term to the next, at least 1; the term is not rescaled by it.
    layer_fraction
        Share of the blocks, in (0, 1]; at least one block is drawn.
    seed
        Chooses the blocks, together with the step.
    """

    twice: ClassVar[bool] = False  # whether the term is itself made of gradients, so the model is differentiated twice

    def __init__(
        self, model: nn.Module, weight: float, interval: int = 1, layer_fraction: float = 1.0, *, seed: int = 0
    ) -> None:
        self.weight, self.interval, self.layer_fraction = weight, interval, layer_fraction
        self.steps = 0
        self._model, self._blocks, self._seed = uncompiled(model), find_blocks(model), seed
        self._undo = ExitStack()
        self._on = False
        self._inputs: dict[str, tuple[Tensor, int]] = {}
        self._pairs: list[Pair] = []

    @abstractmethod
    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:
        """Return the penalty of one forward pass, a scalar, from its blocks' streams and the task loss."""

    @property
    def due(self) -> bool:
        """Whether the next step contributes a term."""
        return self.steps % self.interval == 0

    def term(self, loss: Tensor) -> Tensor:
        """Return what to add to ``loss``, the mean task loss of the forward pass just made; 0 when not due.

        Raises
        ------
        ModelError
            When no block that was drawn has shown a residual stream.
        """
        if not self._on:
            return loss.new_zeros(())
        pairs, self._pairs = self._pairs, []
        if not pairs:
            raise ModelError(
                f"{type(self).__name__} saw no block that returns a stream of the shape that it takes; "
                "switch it off for this model"
            )
        return self.weight * self.measure(pairs, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON-able values."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps = int(state["steps"])

    def __enter__(self) -> Penalty:  # noqa: PYI034 - as `KSSRegularizer`
        self._on = self.due
        if self._on:
            self._undo.enter_context(as_written())
            if self.twice:  # the other kernels of attention have no second derivative
                self._undo.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._undo.callback(self._model.register_forward_pre_hook(self._forget).remove)
            for block in self._chosen():
                before = block.module.register_forward_pre_hook(self._before(block), with_kwargs=True)
                after = block.module.register_forward_hook(self._after(block))
                self._undo.callback(before.remove)
                self._undo.callback(after.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        self._inputs = {}
        self.steps += 1

    def _chosen(self) -> list[Block]:
        return draw_blocks(self._blocks, self.layer_fraction, step_generator(self._seed, self.steps))

    def _forget(self, *_: Any) -> None:
        """Drop what a block has shown that was run again in a backward pass."""
        self._pairs = []

    def _before(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = stream_of(args, kwargs)
            if stream is not None:
                self._inputs[block.name] = (stream, stream._version)

        return hook

    def _after(self, block: Block) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            h_in, version = self._inputs.pop(block.name, (None, 0))
            h_out = None if h_in is None else stream_out(output, h_in.shape)
            if h_in is None or h_out is None:
                return
            if h_in._version != version:
                raise ModelError(
                    f"block {block.name} overwrites its input, which {type(self).__name__} needs; "
                    "let the block return a new tensor"
                )
            self._pairs.append((h_in, h_out))

        return hook


def wide(stream: Tensor) -> Tensor:
    """Return the stream in float32, or float64 where it is."""
    return stream.to(torch.promote_types(stream.dtype, torch.float32))
