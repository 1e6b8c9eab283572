"""A small transformer under Lightning's Trainer, in the loop with a monitor; offline, a minute or two on one core.

In one terminal, to train on the bytes of a text:

    python examples/lightning_module.py runs/lightning

and in another one, to watch the profiles that it writes, and to let it lower the learning rate in need:

    rksp watch runs/lightning --enforce

Without ``--enforce`` the watcher only observes.
"""

from __future__ import annotations

import torch
from byte_text import ByteModel, arguments, next_byte_loss, windows
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from rksp_core.integrations.lightning import RkspCallback

LENGTH = 64


class Bytes(LightningModule):
    """Learns to predict the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ByteModel(LENGTH)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        """Return the loss of one batch of windows."""
        loss = next_byte_loss(self.model(batch), batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train."""
    options = arguments(__doc__)
    seed_everything(0)
    rows = windows(options.text, LENGTH)

    callback = RkspCallback(
        options.run,
        network="model",
        probe=rows[:32].clone(),
        profile_every=options.profile_every,
    )
    trainer = Trainer(
        max_steps=options.steps,
        callbacks=[callback],
        logger=CSVLogger(options.run, name="log", flush_logs_every_n_steps=10),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Bytes(), DataLoader(rows, batch_size=8, shuffle=True, drop_last=True))


if __name__ == "__main__":
    main()
