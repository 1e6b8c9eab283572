"""How the matrices of a model start, and under muP how fast each learns.

    published       what the norm's paper prescribes (`Residual.gain`), GPT-2's rule where it prescribes nothing
    gpt2            every matrix N(0, 0.02^2), the output projections of a block divided by sqrt(2L) (GPT-2)
    gpt2_unscaled   the same without the division
    torch           as `torch.nn` leaves them
    fixup           Zhang et al. 2019, arXiv:1901.09321, Sec. 3: output projections and head 0, the other matrices of a
                    branch a standard initialization (He; Xavier in attention, which has no ReLU) times
                    (2L)^(-1/(2m - 2)), with m = 2 matrices in an MLP and 4 in attention
    rezero          Bachlechner et al. 2020, arXiv:2003.04887: Xavier, and a learned 0 in front of every branch
    mup             Yang et al. 2022, arXiv:2203.03466, Table 8: ``published`` at ``base_width``, continued to other
                    widths such that every activation, and its change in a step of Adam, keep their size

Biases start at 0 and norms at gain 1, except under ``torch``. A model tells `Initialization.fill` the roles of its
parameters by their names: what lies in ``blocks`` and is called ``weight`` is a hidden matrix (out, in), or a stack of
them (experts, out, in); ``output.weight`` is the last of a branch; a `Readout` maps the stream to a few numbers; every
other ``weight`` of two or more dimensions is an embedding. What is called otherwise has started itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from rksp_core.errors import ConfigError
from training.models.arguments import check_counts
from training.models.norms import NORMS, Fixup, Residual, ReZero
from training.names import choose

INITIALIZATIONS = ("published", "gpt2", "gpt2_unscaled", "torch", "fixup", "rezero", "mup")

# These two stand in for normalization: their residual connections hold scalars and no norm.
WITHOUT_NORM: dict[str, type[Residual]] = {"fixup": Fixup, "rezero": ReZero}

SPREAD = 0.02  # GPT-2's standard deviation


@dataclass(frozen=True)
class Initialization:
    """One of `INITIALIZATIONS` for a stack of ``depth`` blocks.

    ``residual`` is the class of its residual connections; ``shrink`` is base_width / width under muP and 1 otherwise.
    """

    name: str
    residual: type[Residual]
    depth: int
    shrink: float = 1.0

    @classmethod
    def of(
        cls,
        name: str,
        norm: str,
        depth: int,
        width: int,
        base_width: int | None,
        known: Collection[str] = INITIALIZATIONS,
    ) -> Initialization:
        """Return the initialization that a model's arguments ask for.

        Raises
        ------
        ConfigError
            When there is none of that name among ``known``, or it does not go with the norm or with ``base_width``.
        """
        choose(name, known, "model.arguments.initialization")
        residual = NORMS[choose(norm, NORMS, "model.arguments.norm")]
        if name in WITHOUT_NORM and norm != "no_norm":
            raise ConfigError(
                f"model.arguments.initialization {name!r} replaces normalization, got norm {norm!r}; "
                "set model.arguments.norm to no_norm"
            )
        if (base_width is None) == (name == "mup"):
            raise ConfigError(
                "model.arguments.base_width, the width whose settings are transferred, belongs to initialization 'mup' "
                f"and to no other, got {base_width!r} with {name!r}"
            )
        if base_width is not None:
            check_counts(base_width=base_width)
        return cls(name, WITHOUT_NORM.get(name, residual), depth, 1.0 if base_width is None else base_width / width)

    @property
    def gain(self) -> float | None:
        """The Xavier gain of the matrices of a branch; None where none is prescribed, or the rule is another."""
        return None if self.name in ("gpt2", "gpt2_unscaled", "torch") else self.residual.gain(self.depth)

    def attention_scale(self, width: int, heads: int) -> float | None:
        """Return the factor of the scores: None for 1 / sqrt(d/H), and in muP 1 / (d/H), equal at the base width."""
        return math.sqrt(self.shrink * heads / width) if self.name == "mup" else None

    def learning_rate_factors(self, model: nn.Module) -> dict[str, float]:
        """Return {parameter name: factor of the learning rate} for Adam and its kin, empty where muP is not used.

        base_width / width for hidden matrices and 1 for the others (Table 8, Adam); SGD would need other numbers.
        """
        if self.name != "mup":
            return {}
        hidden = dict(_hidden(model))
        return {name: self.shrink if name in hidden else 1.0 for name, _ in model.named_parameters()}

    def fill(self, model: nn.Module) -> None:
        """Draw every weight, in the order of the parameters."""
        if self.name == "torch":
            return
        hidden = dict(_hidden(model))
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif name in hidden:
                for matrix in weight.detach().view(-1, *weight.shape[-2:]):
                    self._fill_hidden(name, matrix)
            elif self.name == "fixup" and name == "head.weight":
                nn.init.zeros_(weight)
            elif name.endswith(".weight") and weight.dim() > 1:
                nn.init.normal_(weight, std=SPREAD)

    def _fill_hidden(self, name: str, matrix: Tensor) -> None:
        last, attention = name.endswith(".output.weight"), ".attention." in name
        branches = 2 * self.depth
        if self.name == "fixup" and last:
            nn.init.zeros_(matrix)
        elif self.name == "fixup" and attention:
            nn.init.xavier_normal_(matrix, gain=branches ** (-1 / 6))
        elif self.name == "fixup":
            nn.init.normal_(matrix, std=math.sqrt(2 / matrix.shape[1]) * branches**-0.5)
        elif self.gain is not None:
            nn.init.xavier_normal_(matrix, gain=1.0 if ".query." in name or ".key." in name else self.gain)
        else:
            spread = SPREAD * math.sqrt(self.shrink)
            scaled = last and self.name != "gpt2_unscaled"
            nn.init.normal_(matrix, std=spread / math.sqrt(branches) if scaled else spread)


class Readout(nn.Linear):
    """A map of the stream to a few numbers, such as logits; in muP it reads the stream times base_width / width."""

    def __init__(self, width: int, outputs: int, shrink: float, *, bias: bool = False) -> None:
        super().__init__(width, outputs, bias=bias)
        self.shrink = shrink

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shrink * x)


def _hidden(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    readouts = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Readout)}
    for name, weight in model.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.dim() > 1 and name not in readouts:
            yield name, weight
