"""Find the residual stream of a model, run a probe through it once, and feed each block's moments.

Nothing of the model changes: hooks are removed whatever happens, every module's mode and the random state are left as
found, no gradient is recorded. A block may overwrite its input in place, so the sampled rows of h_in are copied before
the block runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor, nn

from rksp_core import batch as batches
from rksp_core.errors import ModelError, NoBlocksError, ProbeError
from rksp_core.moments import Moments
from rksp_core.untouched import as_written, evaluating


@dataclass(frozen=True)
class Block:
    """One residual block: its dotted name in the model, and the module."""

    name: str
    module: nn.Module


def find_blocks(model: nn.Module, pattern: str | Sequence[str] | None = None) -> list[Block]:
    """Return the residual blocks in depth order.

    Without a pattern: the children of the outermost `nn.ModuleList` or `nn.Sequential` that holds the most
    parameters, which is the stack of blocks in Hugging Face decoders and encoders, `nn.TransformerEncoder` and their
    like. ``pattern`` is a glob on dotted names such as ``transformer.h.*`` (``*`` stays within one name part), or a
    list of globs.

    Raises
    ------
    NoBlocksError
        When nothing matches; the message lists the candidates.
    """
    model = uncompiled(model)
    if pattern is not None:
        globs = [pattern] if isinstance(pattern, str) else list(pattern)
        found = [Block(name, module) for name, module in model.named_modules() if any(_matches(name, g) for g in globs)]
        if not found:
            raise NoBlocksError(f"no module is called {' or '.join(globs)}; {_candidates_text(model)}")
        return found
    stacks = _stacks(model)
    if not stacks:
        raise NoBlocksError(
            f"no stack of residual blocks was found in {type(model).__name__}; {_candidates_text(model)}"
        )
    name, stack = max(stacks, key=lambda entry: _parameters(entry[1]))
    return [Block(f"{name}.{key}" if name else key, child) for key, child in stack.named_children()]


def draw_blocks(blocks: Sequence[Block], fraction: float, generator: torch.Generator) -> list[Block]:
    """Draw a share of the blocks, in (0, 1], at least one, without replacement; in depth order."""
    count = max(1, round(fraction * len(blocks)))
    order = torch.randperm(len(blocks), generator=generator)[:count]
    return [blocks[index] for index in sorted(order.tolist())]


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module behind `torch.compile`, whose graphs would not see hooks that are added later."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def capture(
    model: nn.Module,
    batch: batches.Batch,
    *,
    blocks: str | Sequence[str] | Sequence[Block] | None = None,
    samples: int = 2048,
    seed: int = 0,
    micro_batch: int | None = None,
) -> list[tuple[str, Moments]]:
    """Run the batch through the model and return (name, moments) of each block in depth order.

    Parameters
    ----------
    batch
        Tensor, tuple or dict; ``attention_mask`` (1 = token) and ``src_key_padding_mask`` (True = padding) of a dict
        keep padding out of the sample; in the decoder of an encoder-decoder, ``decoder_attention_mask``.
    blocks
        Glob, globs or blocks; None finds them.
    samples
        At most this many token states, drawn without replacement with ``seed``; the same positions for each block.
    micro_batch
        Sequences in one forward pass; None runs all at once. The sampled positions do not depend on it.

    Raises
    ------
    NoBlocksError
        When no blocks are found.
    ModelError
        When the model raises on the batch, or a block is not run or changes the shape of the stream.
    ProbeError
        When the batch holds no sequence.
    """
    model = uncompiled(model)
    stack = _resolve(model, blocks)
    if not batches.sequences(batch):
        raise ProbeError("the probe holds no sequence; give at least one")
    mask = batches.token_mask(batch, decoder=any("decoder" in block.name for block in stack))
    recorder = _Recorder(batches.sequences(batch), mask, samples, seed)
    handles = []
    try:
        for index, block in enumerate(stack):
            handles.append(block.module.register_forward_pre_hook(recorder.before(index), with_kwargs=True))
            handles.append(block.module.register_forward_hook(recorder.after(index, block.name), with_kwargs=True))
        with evaluating(model), as_written():
            _run(model, batch, recorder, len(stack), micro_batch or batches.sequences(batch))
    finally:
        for handle in handles:
            handle.remove()
    missing = [block.name for index, block in enumerate(stack) if index not in recorder.moments]
    if missing:
        raise ModelError(
            f"the forward pass did not run {missing[0]} ({len(missing)} of {len(stack)} blocks were not run); "
            "name the right ones, for example --blocks 'model.layers.*'"
        )
    return [(block.name, recorder.moments[index]) for index, block in enumerate(stack)]


class _Stop(BaseException):
    """Raised after the last block: what comes behind it (the logits, the largest tensor of all) is not needed.

    No `Exception`: it must pass through a model's own ``except Exception``.
    """


class _Recorder:
    """Hook factory; holds the sampled positions and the moments of each block."""

    def __init__(self, sequences: int, mask: Tensor | None, samples: int, seed: int) -> None:
        self.moments: dict[int, Moments] = {}
        self.done: set[int] = set()
        self.start, self.stop = 0, 0
        self.stop_after: int | None = None
        self._before: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._count = sequences
        self._mask = mask
        self._samples, self._seed = samples, seed
        self._chosen: Bool[Tensor, "sequences length"] | None = None

    def before(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            stream = stream_of(args, kwargs)
            if stream is None or index in self.done:
                return
            self._before[index] = (self._rows(stream).clone(), tuple(stream.shape))

        return hook

    def after(self, index: int, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ARG001
            if index in self.done:  # a shared block that runs again: its first run stands for the layer
                return
            if index not in self._before:
                raise ModelError(f"block {name} takes no floating tensor; name the residual blocks with --blocks")
            h_in, shape = self._before.pop(index)
            stream = stream_out(output, shape)
            if stream is None:
                raise ModelError(
                    f"block {name} changes the shape of the stream, in {shape}, out {_shapes(output)}; "
                    "name blocks that keep it with --blocks"
                )
            if index not in self.moments:
                self.moments[index] = Moments(shape[-1], samples=self._expected())
            self.moments[index].update(h_in, self._rows(stream))
            self.done.add(index)
            if self.stop_after is not None and len(self.done) == self.stop_after:
                raise _Stop

        return hook

    def _rows(self, stream: Tensor) -> Tensor:
        """Return the sampled rows of a (sequences, length, width), (length, sequences, width) or (tokens, width)."""
        here = self.stop - self.start
        if stream.ndim > 2 and stream.shape[0] != here and stream.shape[1] == here:
            stream = stream.transpose(0, 1)
        flat = stream.reshape(here, -1, stream.shape[-1])
        chosen = self._positions(flat.shape[1])[self.start : self.stop]
        return flat[chosen.to(flat.device)]

    def _positions(self, length: int) -> Bool[Tensor, "sequences length"]:
        if self._chosen is None:
            self._chosen = sample_positions(self._count, length, self._mask, self._samples, self._seed)
        if self._chosen.shape[1] != length:
            raise ModelError(
                f"blocks see streams of {self._chosen.shape[1]} and of {length} positions; name blocks of one stream "
                "with --blocks"
            )
        return self._chosen

    def _expected(self) -> int:
        return int(self._chosen.sum()) if self._chosen is not None else self._samples


def sample_positions(
    sequences: int, length: int, mask: Tensor | None, samples: int, seed: int
) -> Bool[Tensor, "sequences length"]:
    """Choose at most ``samples`` token positions without replacement; True marks a chosen one.

    ``mask`` is True where a token is real: (sequences, length), or (length, sequences) where the stream has its
    positions first and so counts them as sequences; one of another length (image patches, say) is not used. The draw
    depends on the arguments alone and leaves the global random state alone.
    """
    if mask is not None and tuple(mask.shape) == (length, sequences) != (sequences, length):
        mask = mask.T
    usable = mask.cpu() if mask is not None and tuple(mask.shape) == (sequences, length) else None
    valid = (
        (torch.ones(sequences, length, dtype=torch.bool) if usable is None else usable).flatten().nonzero().flatten()
    )
    order: Int[Tensor, " valid"] = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(sequences * length, dtype=torch.bool)
    chosen[valid[order[:samples]]] = True
    return chosen.reshape(sequences, length)


def stream_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the residual stream among a block's arguments: the first floating tensor, positional ones first."""
    named = [kwargs[name] for name in ("hidden_states", "x", "src", "input") if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return value
    return None


def stream_out(output: Any, shape: Sequence[int]) -> Tensor | None:
    """Return the first tensor of that shape in a block's output: itself, or within a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output if tuple(output.shape) == tuple(shape) else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((v for v in values if isinstance(v, Tensor) and tuple(v.shape) == tuple(shape)), None)


def _run(model: nn.Module, batch: batches.Batch, recorder: _Recorder, blocks: int, size: int) -> None:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    said = isinstance(batch, Mapping) and "use_cache" in batch
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") and not said else {}
    # Under FSDP every rank has to finish its forward pass, so there it is not cut short.
    recorder.stop_after = None if dist.is_available() and dist.is_initialized() else blocks
    for start in range(0, batches.sequences(batch), size):
        recorder.start, recorder.stop = start, min(start + size, batches.sequences(batch))
        recorder.done.clear()
        try:
            batches.call(model, batches.to_device(batches.part(batch, recorder.start, recorder.stop), device), **extra)
        except _Stop:
            continue
        except (torch.OutOfMemoryError, MemoryError, ModelError):
            raise
        except Exception as error:
            if "allocate memory" in str(error):
                raise
            raise ModelError(
                f"{type(model).__name__} raised {type(error).__name__} on the probe ({_first_line(error)}); "
                "check that the probe fits the model"
            ) from error


def _resolve(model: nn.Module, blocks: str | Sequence[str] | Sequence[Block] | None) -> list[Block]:
    if blocks and not isinstance(blocks, str) and all(isinstance(block, Block) for block in blocks):
        return [block for block in blocks if isinstance(block, Block)]
    return find_blocks(model, blocks)  # type: ignore[arg-type]


def _stacks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Outermost stacks with parameters; a list inside a block (experts, heads) belongs to that block."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or not outer for outer, _ in found):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and _parameters(module):
            found.append((name, module))
    lists = [entry for entry in found if isinstance(entry[1], nn.ModuleList)]
    return lists or found


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matches(name: str, glob: str) -> bool:
    pattern = "".join("[^.]*" if c == "*" else "[^.]" if c == "?" else re.escape(c) for c in glob)
    return bool(name) and re.fullmatch(pattern, name) is not None


def _candidates_text(model: nn.Module) -> str:
    names = [f"{name}.*" for name, child in model.named_modules() if isinstance(child, nn.ModuleList | nn.Sequential)]
    names += [name for name, _ in model.named_children()]
    listed = ", ".join(dict.fromkeys(name for name in names if name != ".*")) or "none at all"
    return f"name them with --blocks; candidates: {listed[:400]}"


def _shapes(output: Any) -> str:
    values = output if isinstance(output, tuple | list) else [output]
    return ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
