"""A decoder whose MLP is a mixture of experts: each token is computed by the k of E experts that its router prefers.

Shazeer et al. 2017, arXiv:1701.06538 (top-k gating); Lepikhin et al. 2021, arXiv:2006.16668 (GShard: k = 2, capacity,
first choices before second ones); Fedus et al. 2022, arXiv:2101.03961 (Switch: k = 1, the balancing loss of Eq. 4-6).

Shapes: as in `gpt`, N = BT tokens, E experts, C = capacity of an expert in tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rksp_core.errors import ConfigError
from training.models.arguments import check_counts, check_number
from training.models.gpt import Decoder
from training.models.initialization import Initialization, Readout


class MoE(Decoder):
    """The decoder with a mixture of MLPs.

    Parameters
    ----------
    vocabulary, length, width, depth, heads, norm, initialization, base_width
        As for `training.models.gpt.GPT`.
    experts, top_k
        E, and how many of them compute a token, 1..E.
    capacity
        An expert takes at most C = ceil(capacity k N / E) tokens of a batch; those beyond are dropped: for them the
        expert adds nothing to the residual stream. E / k drops none. Whether a token finds room depends on the other
        tokens of the batch, for a second choice on later ones too, as in GShard.
    balance
        Weight of the load-balancing loss, summed over the blocks; 0.01 in both papers.

    Raises
    ------
    ConfigError
        When an argument is out of its range, or two do not go together.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        experts: int = 8,
        top_k: int = 2,
        capacity: float = 1.25,
        balance: float = 0.01,
        norm: str = "pre_ln",
        initialization: str = "published",
        base_width: int | None = None,
    ) -> None:
        check_counts(experts=experts, top_k=top_k)
        check_number("capacity", capacity, above=0)
        check_number("balance", balance, least=0)
        if top_k > experts:
            raise ConfigError(f"model.arguments.top_k must be at most experts, got top_k {top_k} of {experts} experts")
        super().__init__(
            *(vocabulary, length, width, depth, heads, norm, initialization, base_width),
            feed_forward=lambda start: Mixture(width, experts, top_k, capacity, start),
        )
        self.balance = balance

    @property
    def mixtures(self) -> list[Mixture]:
        """The mixtures of the blocks, in depth order."""
        return [block.mlp for block in self.blocks]

    def auxiliary_loss(self) -> Tensor:
        """Return the weighted load-balancing loss of the last forward pass, a scalar to add to the task's."""
        return self.balance * torch.stack([mixture.imbalance for mixture in self.mixtures]).sum()

    @property
    def dropped_share(self) -> float:
        """Share of the (token, choice) pairs of the last forward pass that found no room, 0..1, over all blocks."""
        return float(torch.stack([mixture.dropped_share for mixture in self.mixtures]).mean())


class Mixture(nn.Module):
    """A router and E MLPs without biases (as in T5, on which Switch is built).

    The gates are the router's probabilities of the chosen experts: as they are for k = 1 (Switch, Eq. 2; the router
    has no other gradient), and divided by their sum for k > 1 (GShard; Shazeer et al. take the softmax over the chosen
    ones, which is the same).
    """

    def __init__(self, width: int, experts: int, top_k: int, capacity: float, start: Initialization) -> None:
        super().__init__()
        self.experts, self.top_k, self.capacity = experts, top_k, capacity
        self.router = Readout(width, experts, start.shrink)
        self.up = ExpertLinear(experts, width, 4 * width)
        self.inner = start.residual.inner(4 * width)
        self.output = ExpertLinear(experts, 4 * width, width)
        self.imbalance = torch.zeros(())  # E sum_e f_e P_e of the last forward pass: 1 when balanced, at most E
        self.dropped_share = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d) -> (B, T, d)
        tokens = x.flatten(0, 1)  # (N, d)
        gates, chosen = self._route(tokens)  # (k N,), all first choices before all second ones
        slots, kept = self._slots(chosen)  # (k N,)
        room = self.experts * self._room(len(tokens))  # E C
        # Which token stands in each slot: number 0 in an empty one, whose result nobody fetches. Those without room
        # share one slot more, which is cut off.
        numbers = torch.arange(len(tokens), device=x.device).repeat(self.top_k)
        occupants = slots.new_zeros(room + 1).scatter(0, slots.where(kept, room), numbers)[:room]
        inside = self.up(tokens.index_select(0, occupants).unflatten(0, (self.experts, -1)))  # (E, C, 4d)
        results = self.output(self.inner(functional.gelu(inside, approximate="tanh"))).flatten(0, 1)  # (E C, d)
        fetched = results.index_select(0, slots.where(kept, 0)) * (gates * kept).unsqueeze(1)  # (k N, d)
        return fetched.unflatten(0, (self.top_k, -1)).sum(0).view(x.shape)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and experts of the (choice, token) pairs (k N,); in float32 at least, whatever the autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            scores = self.router(tokens.to(self.router.weight.dtype))  # (N, E)
        probabilities = scores.softmax(-1)
        gates, chosen = probabilities.topk(self.top_k)  # (N, k)
        if self.top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        shares = functional.one_hot(chosen.flatten(), self.experts).to(scores.dtype).mean(0)  # f (E,), sums to 1
        self.imbalance = self.experts * (shares * probabilities.mean(0)).sum()
        return gates.T.flatten(), chosen.T.flatten()

    def _slots(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of each (choice, token) pair, counted over all experts, and whether there is room for it."""
        room = self._room(len(chosen) // self.top_k)
        before = functional.one_hot(chosen, self.experts).cumsum(0).gather(1, chosen.unsqueeze(1)).squeeze(1) - 1
        kept = before < room
        self.dropped_share = 1 - kept.to(self.router.weight.dtype).mean()
        return chosen * room + before, kept

    def _room(self, tokens: int) -> int:
        return min(tokens, math.ceil(self.capacity * self.top_k * tokens / self.experts))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the graph of the last forward pass, which can be neither copied nor pickled."""
        return self.__dict__ | {"imbalance": torch.zeros(())}


class ExpertLinear(nn.Module):
    """E linear maps without biases, each of its own rows: (E, C, inputs) -> (E, C, outputs)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)  # as `nn.Linear` does

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2))
