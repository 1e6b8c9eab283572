"""What may announce a divergence beside the spectra: cheap figures of one forward pass and of the optimizer's state.

    update_ratio_max, update_ratio_median   |change of a matrix in the last step| / |the matrix|, over all matrices
    surprise_rms, surprise_max              |g| / sqrt(v_hat) over the entries of the blocks: the last gradient (after
                                            clipping) against the second moments of Adam before it came. 1 is usual
    second_moment_top_share                 share of the sum of v_hat that its largest hundredth of entries holds
    momentum_cosine                         between the last gradient and the momentum before it (Adam, Lion, SGD)
    attention_entropy_min, _mean            over the heads of all layers, mean over queries, in nats
    attention_logit_max                     largest absolute score before the softmax
    logit_max, logit_rms                    of the model's output
    hidden_rms_first, hidden_rms_last       of the first and the last block's output
    hidden_rms_ratio                        last / first
    weight_norm_max, weight_norm_head       largest spectral norm of a matrix of the blocks, and of the head
    probe_loss                              mean loss of the tokens of the probe
    probe_loss_tail                         99th percentile / mean of these losses

What a model or an optimizer does not have is left out. Nothing here changes the run: the weights are read, random
numbers are not drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core import find_blocks
from rksp_core.untouched import as_written, evaluating
from rksp_core.weight_norms import spectral_norm
from training.models.gpt import Attention
from training.run import Run
from training.tasks import Batch
from training.tasks.next_token import NOT_ASKED

INDICATORS = (
    "update_ratio_max",
    "update_ratio_median",
    "surprise_rms",
    "surprise_max",
    "second_moment_top_share",
    "momentum_cosine",
    "attention_entropy_min",
    "attention_entropy_mean",
    "attention_logit_max",
    "logit_max",
    "logit_rms",
    "hidden_rms_first",
    "hidden_rms_last",
    "hidden_rms_ratio",
    "weight_norm_max",
    "weight_norm_head",
    "probe_loss",
    "probe_loss_tail",
)

_MOMENTA = ("exp_avg", "momentum_buffer")  # of Adam and Lion, and of SGD


class Before:
    """The weights and the optimizer's moments before a step, kept so that the step can be measured after it."""

    def __init__(self, run: Run) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in run.model.named_parameters():
            state = run.optimizer.state.get(parameter, {})
            kept = {
                key: state[key].detach().clone() for key in ("exp_avg_sq", "step", *_MOMENTA) if _tensor(state, key)
            }
            self.state[name] = kept


def indicators(run: Run, probe: Batch, before: Before | None) -> dict[str, float]:
    """Return the figures by the names of `INDICATORS`; those of a step need the state ``before`` it.

    To be called after a step and before the next, while the parameters have the gradients of the step.
    """
    return (_of_step(run, before) if before is not None else {}) | _of_weights(run.model) | _of_probe(run, probe)


def _of_step(run: Run, before: Before) -> dict[str, float]:
    ratios = []
    for name, parameter in run.model.named_parameters():
        if parameter.dim() >= 2:
            old = before.weights[name]
            ratios.append(float((parameter.detach() - old).norm() / old.norm().clamp_min(1e-12)))
    found = {"update_ratio_max": max(ratios), "update_ratio_median": statistics.median(ratios)}
    return found | _surprise(run, before) | _cosine(run, before)


def _surprise(run: Run, before: Before) -> dict[str, float]:
    group = run.optimizer.param_groups[0]
    inside = _names_of_blocks(run.model)
    squares, moments, count, largest = 0.0, [], 0, 0.0
    for name, parameter in run.model.named_parameters():
        state = before.state[name]
        if parameter.grad is None or "exp_avg_sq" not in state:
            continue
        v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        moments.append(v_hat.flatten())
        if name in inside:
            surprise = parameter.grad.abs() / (v_hat.sqrt() + group["eps"])
            squares += float(surprise.double().square().sum())
            largest = max(largest, float(surprise.max()))
            count += surprise.numel()
    if not count:
        return {}
    everything = torch.cat(moments)
    top = everything.topk(max(1, len(everything) // 100)).values.sum() / everything.sum()
    return {
        "surprise_rms": math.sqrt(squares / count),
        "surprise_max": largest,
        "second_moment_top_share": float(top),
    }


def _cosine(run: Run, before: Before) -> dict[str, float]:
    dot, lengths = 0.0, [0.0, 0.0]
    for name, parameter in run.model.named_parameters():
        momentum = next((before.state[name][key] for key in _MOMENTA if key in before.state[name]), None)
        if momentum is not None and parameter.grad is not None:
            gradient = parameter.grad.double()
            dot += float((gradient * momentum).sum())
            lengths[0] += float(gradient.square().sum())
            lengths[1] += float(momentum.double().square().sum())
    return {"momentum_cosine": dot / math.sqrt(lengths[0] * lengths[1])} if all(lengths) else {}


def _of_weights(model: nn.Module) -> dict[str, float]:
    inside = _names_of_blocks(model)
    named = [(name, weight.detach()) for name, weight in model.named_parameters() if weight.dim() == 2]
    norms = [spectral_norm(weight) for name, weight in named if name in inside]
    head = [spectral_norm(weight) for name, weight in named if name == "head.weight"]
    return ({"weight_norm_max": max(norms)} if norms else {}) | ({"weight_norm_head": head[0]} if head else {})


def _of_probe(run: Run, probe: Batch) -> dict[str, float]:
    blocks = find_blocks(run.model)
    hidden: list[float] = []
    seen = _Attentions()
    with ExitStack() as stack:
        stack.enter_context(evaluating(run.model))
        stack.enter_context(as_written())
        for block in (blocks[0], blocks[-1]):
            stack.enter_context(_hooked(block.module, lambda _, output: hidden.append(_rms(output))))
        for module in run.model.modules():
            if isinstance(module, Attention):
                seen.watch(stack, module)
        logits = run.model(run.to_model(probe.inputs)).double()
    found = {"logit_max": float(logits.abs().max()), "logit_rms": _rms(logits)}
    if len(hidden) == 2:
        found |= {
            "hidden_rms_first": hidden[0],
            "hidden_rms_last": hidden[1],
            "hidden_rms_ratio": hidden[1] / hidden[0],
        }
    return found | seen.figures() | _losses(logits, probe.targets.to(logits.device))


def _losses(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return mean and tail of the losses of logits (B, T, V), whose last k have targets (B, k), or (B, V) with (B,)."""
    if logits.dim() == 3:
        logits = logits[:, -targets.shape[1] :]
    targets = targets.flatten()
    asked = targets != NOT_ASKED
    losses = functional.cross_entropy(logits.flatten(0, -2)[asked], targets[asked], reduction="none")
    mean = float(losses.mean())
    return {"probe_loss": mean, "probe_loss_tail": float(losses.quantile(0.99)) / mean if mean > 0 else math.nan}


class _Attentions:
    """Sees queries and keys pass, as the fused attention shows no scores, and computes these again."""

    def __init__(self) -> None:
        self._entropies: list[Tensor] = []
        self._largest = 0.0

    def watch(self, stack: ExitStack, module: Attention) -> None:
        kept: dict[str, Tensor] = {}
        stack.enter_context(_hooked(module.query, lambda _, output: kept.update(query=output)))
        stack.enter_context(_hooked(module.key, lambda _, output: kept.update(key=output)))
        stack.enter_context(_hooked(module, lambda *_: self._add(module, kept["query"], kept["key"])))

    def figures(self) -> dict[str, float]:
        if not self._entropies:
            return {}
        heads = torch.cat(self._entropies)
        return {
            "attention_entropy_min": float(heads.min()),
            "attention_entropy_mean": float(heads.mean()),
            "attention_logit_max": self._largest,
        }

    def _add(self, module: Attention, query: Tensor, key: Tensor) -> None:
        split = (*query.shape[:2], module.heads, -1)
        q, k = (part.view(split).transpose(1, 2) for part in (query, key))  # (B, H, T, d/H)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if module.scale is None else module.scale)  # (B, H, T, T)
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        if not module.causal:
            future = torch.zeros_like(future)
        logs = scores.masked_fill(future, -math.inf).log_softmax(dim=-1)
        entropy = -(logs.exp() * logs.masked_fill(future, 0.0)).sum(dim=-1)  # (B, H, T)
        self._entropies.append(entropy.mean(dim=(0, 2)))
        self._largest = max(self._largest, float(scores.masked_fill(future, 0.0).abs().max()))


@contextmanager
def _hooked(module: nn.Module, seen: Callable[[Any, Any], None]) -> Iterator[None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        seen(inputs, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _names_of_blocks(model: nn.Module) -> set[str]:
    return {f"{block.name}.{name}" for block in find_blocks(model) for name, _ in block.module.named_parameters()}


def _rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def _tensor(state: Any, key: str) -> bool:
    return isinstance(state.get(key), Tensor)
