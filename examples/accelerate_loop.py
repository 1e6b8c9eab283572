"""A training loop of one's own with Accelerate, in the loop with a monitor; offline, a minute or two on one core.

In one terminal, to train on the bytes of a text, in one process or in two:

    python examples/accelerate_loop.py runs/loop
    torchrun --nproc-per-node=2 examples/accelerate_loop.py runs/loop

and in another one, to watch the profiles that it writes, and to let it lower the learning rate in need:

    rksp watch runs/loop --enforce

Without ``--enforce`` the watcher only observes. There is no adapter: the loop holds a `KSSRegularizer`, which is the
context of its forward pass, and a `ControlFollower`, which obeys at the step boundary of all processes at once. A loop
without Accelerate is the same less its calls.
"""

from __future__ import annotations

from itertools import count

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from byte_text import ByteModel, arguments, next_byte_loss, windows
from torch.utils.data import DataLoader

from rksp_core import ControlFollower, KSSRegularizer, Limits, ProfileWriter, profile_model

LENGTH, RATE = 64, 3e-3


def main() -> None:
    """Train."""
    options = arguments(__doc__)
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    rows = windows(options.text, LENGTH)
    model = ByteModel(LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    regularizer = KSSRegularizer(model, alpha=0.0)  # of the model itself, before it is wrapped; off until an order
    limits = Limits(learning_rate_scale=(0.01, 1.0))  # an order may lower the rate, as this loop applies it
    follower = ControlFollower(options.run / "control", options.run.resolve().name, regularizer, limits)
    profiles = ProfileWriter(options.run, every=options.profile_every)

    loader = DataLoader(rows, batch_size=8, shuffle=True, drop_last=True)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = (batch for _ in count() for batch in loader)
    for step, batch in zip(range(options.steps), batches, strict=False):
        follower.follow(step)
        with regularizer:
            loss = next_byte_loss(parallel(batch), batch)
        term = regularizer.term()  # 0 when none is due
        accelerator.backward(loss + term)
        norm = accelerator.clip_grad_norm_(parallel.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (follower.levers.learning_rate_scale or 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.is_main_process and profiles.due(step + 1):
            profiles.write(profile_model(model, rows[:32]), step + 1, loss=loss.item(), gradient_norm=norm)
        if step % 10 == 0:
            alpha = regularizer.settings.alpha
            accelerator.print({"step": step, "loss": loss.item(), "kss_weight": alpha, "kss_term": term.item()})
    accelerator.end_training()


if __name__ == "__main__":
    main()
