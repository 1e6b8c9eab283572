"""A model that computes in float64 throughout, and padded batches for it: trainers are compared to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH = 40, 12, 16
IGNORED = -100


class Residual(nn.Module):
    """h + tanh(W h): a block in the sense of the method."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Words(nn.Module):
    """Takes what a Hugging Face model takes and returns its loss: the mean over labels, or their share of all items."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.double()

    def logits(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        logits = self.logits(input_ids)
        if labels is None:
            return {"logits": logits}
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        items = kwargs.get("num_items_in_batch", (labels != IGNORED).sum())
        return {"loss": losses.sum() / items, "logits": logits}


class OwnMean(Words):
    """Knows nothing of the items of other batches, and answers with a tuple, as some models do."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = super().forward(input_ids, attention_mask, labels)
        return output["loss"], output["logits"]


def rows(count: int) -> list[dict[str, Tensor]]:
    """Return sequences of different lengths, padded; to be predicted is the token itself, which is hard enough."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        real = torch.arange(LENGTH) < LENGTH - 2 * (index % 5)
        labels = torch.where(real, ids, IGNORED)
        found.append({"input_ids": torch.where(real, ids, 0), "attention_mask": real.long(), "labels": labels})
    return found


def stacked(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as one batch."""
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def weights(model: nn.Module) -> Tensor:
    """Return all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
