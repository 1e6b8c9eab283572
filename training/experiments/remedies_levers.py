"""What a remedy does to a run: forms of KSS, how a penalty's gradient is applied, and the levers of the control arms.

All act through what a run has already: penalties around the forward pass, and hooks of the optimizer before and after
its update. So the step is the trainer's own (`training.step.advance`), and an arm that does nothing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rksp_core import find_blocks
from rksp_core.dmd import leading_directions
from rksp_core.kss import RANK, eigenvalue_moduli, kss_loss, step_generator
from rksp_core.spectrum import LOWER, UPPER
from rksp_core.surprise import clip_surprise
from training.models.gpt import Attention
from training.run import Run
from training.stabilizers.penalty import Pair, Penalty

Form = Callable[[Tensor, Tensor], Tensor]


# Forms: h_in, h_out (tokens, width) -> a scalar. `A` is the operator on the leading r directions of the input.


def operator(h_in: Tensor, h_out: Tensor, *, whitened: bool) -> Tensor:
    """Return A (r, r), in float64; whitening carries no gradient."""
    x, y = h_in.double(), h_out.double()
    x, y = x - x.mean(0), y - y.mean(0)
    covariance = x.detach().T @ x.detach() / (len(x) - 1)
    variance, basis = leading_directions(covariance, min(RANK, x.shape[1]), 0)
    basis = basis[:, variance > 1e-10 * variance[0]]
    x, y = x @ basis, y @ basis
    reduced = torch.linalg.solve(x.T @ x, x.T @ y).T
    if not whitened:
        return reduced
    scale = x.detach().std(0)
    return reduced * scale / scale[:, None]


def _moduli(h_in: Tensor, h_out: Tensor) -> Tensor:
    return eigenvalue_moduli(operator(h_in, h_out, whitened=False))


def _soft(moduli: Tensor) -> Tensor:
    return (torch.sigmoid(20 * (moduli - LOWER)) * torch.sigmoid(20 * (UPPER - moduli))).mean()


def _kreiss(h_in: Tensor, h_out: Tensor) -> Tensor:
    """Log K_theta at the best point of a grid, theta = max(1, 1.05 rho)."""
    A = operator(h_in, h_out, whitened=True)
    theta = (1.05 * eigenvalue_moduli(A).max()).clamp_min(1.0)
    depths = torch.logspace(-2, 0.7, 6, dtype=A.dtype).repeat_interleave(9)
    circle = torch.polar(torch.ones(9, dtype=A.dtype), torch.linspace(0, math.pi, 9, dtype=A.dtype)).repeat(6)
    points = theta * (1 + depths) * circle
    resolvents = points[:, None, None] * torch.eye(len(A), dtype=A.dtype) - A
    best = int((theta * depths / torch.linalg.svdvals(resolvents.detach())[:, -1]).argmax())
    return torch.log(theta * depths[best] / torch.linalg.svdvals(resolvents[best])[-1])


def _growth(h_in: Tensor, h_out: Tensor) -> Tensor:
    """Log of the largest |A^n|_2 theta^-n, n <= 16, theta = max(1, rho)."""
    A = operator(h_in, h_out, whitened=True)
    theta = eigenvalue_moduli(A).max().clamp_min(1.0)
    powers = [A / theta]
    for _ in range(15):
        powers.append(powers[-1] @ powers[0])
    return torch.linalg.matrix_norm(torch.stack(powers), 2).max().log()


FORMS: dict[str, Form] = {
    "paper": kss_loss,
    "hinge": lambda x, y: kss_loss(x, y, variant="hinge"),
    "unstable": lambda x, y: kss_loss(x, y, beta=0.0),
    "near_unit": lambda x, y: (_soft(_moduli(x, y)) - 0.4).square(),
    "radius": lambda x, y: (_moduli(x, y) - UPPER).relu().square().sum(),
    "log_sigma": lambda x, y: torch.linalg.svdvals(operator(x, y, whitened=True)).log().relu().square().mean(),
    "kreiss": _kreiss,
    "growth": _growth,
}


class Shaping(Penalty):
    """A form of KSS as a penalty: its gradient is added to the loss, or kept for `Applied` to use."""

    def __init__(self, run: Run, form: str, weight: float, interval: int, layer_fraction: float, apply: str) -> None:
        super().__init__(run.model, weight, interval, layer_fraction, seed=run.config.seed)
        self._form, self._apply = FORMS[form], apply
        self._parameters = list(run.model.parameters())
        self.active = False
        self.ramp = 1.0
        self.gradients: list[Tensor] | None = None
        self.skipped = 0

    @property
    def due(self) -> bool:
        """Whether the next step contributes a term."""
        return self.active and super().due

    def measure(self, pairs: list[Pair], loss: Tensor) -> Tensor:
        """Return the ramped mean over blocks, or 0 where the gradient is applied apart from the loss."""
        terms = []
        for pair in pairs:
            h_in, h_out = (each.flatten(0, -2) for each in pair)
            term = self._term(h_in, h_out)
            if term is None:
                self.skipped += 1
            else:
                terms.append(term)
        if not terms:
            return loss.new_zeros(())
        total = self.ramp * torch.stack(terms).mean()
        if self._apply == "loss":
            return total.float()
        found = torch.autograd.grad(total, self._parameters, retain_graph=True, allow_unused=True)
        self.gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True)]
        return loss.new_zeros(())

    def _term(self, h_in: Tensor, h_out: Tensor) -> Tensor | None:
        """Return the form with its gradient attached to the streams; None where it has none."""
        x, y = h_in.detach().requires_grad_(), h_out.detach().requires_grad_()
        try:
            value = self._form(x, y)
            slopes = torch.autograd.grad(value, (x, y))
        except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]
            return None
        if not all(bool(slope.isfinite().all()) for slope in slopes):
            return None
        tie = ((h_in - h_in.detach()) * slopes[0]).sum() + ((h_out - h_out.detach()) * slopes[1]).sum()
        return value.detach() + tie.double()


class Remedy:
    """One remedy on one run, off until `switch_on`; its arguments are those of `training.experiments.remedies.Arm`."""

    def __init__(self, run: Run, arm: Any) -> None:
        self.run, self.arm = run, arm
        self.active = False
        self.since = 0
        self._shaping: Shaping | None = None
        self._old: list[Tensor] = []
        self._attentions = [module for module in run.model.modules() if isinstance(module, Attention)]
        self._seen: dict[Attention, dict[str, Tensor]] = {}
        self._parameters = list(run.model.parameters())
        inside = [parameter for block in find_blocks(run.model) for parameter in block.module.parameters()]
        self._matrices = [parameter for parameter in inside if parameter.dim() == 2]
        if arm.form is not None:
            self._shaping = Shaping(run, arm.form, arm.weight, arm.interval, arm.layer_fraction, arm.apply)
            run.penalties.append(self._shaping)
        run.optimizer.register_step_pre_hook(lambda *_: self._before_update())
        run.optimizer.register_step_post_hook(lambda *_: self._after_update())
        if arm.logit_cap is not None or arm.form_cap is not None:
            for module in self._attentions:
                self._watch(module)

    def switch_on(self) -> None:
        """Let the levers act from the next step on."""
        self.active, self.since = True, self.run.step
        if self._shaping is not None:
            self._shaping.active = True
        if self.arm.beta2 is not None:
            for group in self.run.optimizer.param_groups:
                group["betas"] = (group["betas"][0], self.arm.beta2)

    def switch_off(self) -> None:
        """Let nothing act."""
        self.active = False
        if self._shaping is not None:
            self._shaping.active = False

    def _before_update(self) -> None:
        if not self.active:
            return
        arm, gradients = self.arm, [p.grad for p in self._parameters if p.grad is not None]
        for group in self.run.optimizer.param_groups:
            group["lr"] *= arm.rate
        if arm.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, arm.clip)
        if arm.surprise is not None:
            clip_surprise(self.run.optimizer, arm.surprise)
        if arm.noise is not None:
            generator = step_generator(self.run.config.seed, self.run.step)
            noise = [torch.randn(g.shape, generator=generator) for g in gradients]
            factor = arm.noise * nn.utils.get_total_norm(gradients) / nn.utils.get_total_norm(noise)
            torch._foreach_add_(gradients, torch._foreach_mul(noise, factor))
        if self._shaping is not None:
            self._shaping.ramp = min(1.0, (self.run.step + 1 - self.since) / arm.ramp) if arm.ramp else 1.0
            if self._shaping.gradients is not None and arm.apply == "gradient":
                extra, self._shaping.gradients = self._shaping.gradients, None
                factor = arm.ratio * nn.utils.get_total_norm(gradients) / nn.utils.get_total_norm(extra)
                if bool(torch.isfinite(factor)):
                    torch._foreach_add_([p.grad for p in self._parameters], torch._foreach_mul(extra, factor))
            elif self._shaping.gradients is not None:
                self._old = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def _after_update(self) -> None:
        if not self.active:
            return
        arm = self.arm
        if self._old and self._shaping is not None and self._shaping.gradients is not None:
            extra, self._shaping.gradients = self._shaping.gradients, None
            moved = nn.utils.get_total_norm([p - old for p, old in zip(self._parameters, self._old, strict=True)])
            factor = arm.ratio * moved / nn.utils.get_total_norm(extra)
            if bool(torch.isfinite(factor)):
                torch._foreach_sub_(self._parameters, torch._foreach_mul(extra, factor))
            self._old = []
        if arm.shrink is not None:
            torch._foreach_mul_(self._matrices, 1 - arm.shrink)
        if arm.weight_cap is not None and self.run.step % arm.interval == 0:
            for weight in self._matrices:
                short = weight if weight.shape[0] < weight.shape[1] else weight.T
                squared = torch.linalg.eigvalsh(short @ short.T)[-1]  # half the time of the singular values
                weight.mul_((arm.weight_cap * squared.rsqrt()).clamp(max=1.0))
        if arm.logit_cap is not None and self.run.step % arm.interval == 0:
            for module in self._attentions:
                self._cap(module, arm.logit_cap)
        if arm.form_cap is not None and self.run.step % arm.interval == 0:
            for module in self._attentions:
                self._cap_form(module, arm.form_cap)

    def _watch(self, module: Attention) -> None:
        kept = self._seen.setdefault(module, {})
        module.query.register_forward_hook(lambda _, __, output: kept.update(query=output.detach()))
        module.key.register_forward_hook(lambda _, __, output: kept.update(key=output.detach()))

    def _bounds(self, module: Attention) -> Tensor:
        """Return the bound of each head (H,)."""
        seen = self._seen[module]
        q, k = (seen[name].view(*seen[name].shape[:2], module.heads, -1) for name in ("query", "key"))
        scale = q.shape[-1] ** -0.5 if module.scale is None else module.scale
        return scale * (q.norm(dim=-1).amax((0, 1)) * k.norm(dim=-1).amax((0, 1)))

    def _cap(self, module: Attention, cap: float) -> None:
        """QK-clip (Kimi K2, arXiv:2507.20534, Sec. 2.1): a head whose logits are above the cap is scaled back to it."""
        self._scale_back(module, cap / self._bounds(module))

    def _cap_form(self, module: Attention, cap: float) -> None:
        """Scale a head whose form has a singular value above the cap back to it, in coordinates of unit variance.

        With S the second moment of the input, those of scale S^1/2 W_q^T W_k S^1/2 are those of Q^1/2 K^1/2, where
        Q and K are the second moments of queries and keys.
        """
        seen = self._seen[module]
        roots = []
        for name in ("query", "key"):
            rows = seen[name].flatten(0, 1).unflatten(-1, (module.heads, -1)).transpose(0, 1)  # (H, tokens, d/H)
            values, vectors = torch.linalg.eigh(rows.mT @ rows / rows.shape[1])
            roots.append(vectors * values.clamp_min(0).sqrt()[:, None, :])
        scale = roots[0].shape[-1] ** -0.5 if module.scale is None else module.scale
        sigma = scale * torch.linalg.matrix_norm(roots[0].mT @ roots[1], 2)
        self._scale_back(module, cap / sigma)

    def _scale_back(self, module: Attention, factor: Tensor) -> None:
        """Multiply the scores of each head by its factor (H,), where that is below 1."""
        each = factor.clamp(max=1.0).sqrt().repeat_interleave(module.query.out_features // module.heads)
        for part in (module.query, module.key):
            part.weight.mul_(each[:, None])
            part.bias.mul_(each)
