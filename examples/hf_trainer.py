"""A tiny LLaMA under the Hugging Face Trainer, in the loop with a monitor; offline, a minute or two on one core.

In one terminal, to train on the bytes of a text:

    python examples/hf_trainer.py runs/hf

and in another one, to watch its profiles and checkpoints, and to let it lower the learning rate in need:

    rksp watch runs/hf --model runs/hf/config.json --enforce

Without ``--enforce`` the watcher only observes. ``--resume`` goes on from the newest checkpoint.
"""

from __future__ import annotations

import sys
from typing import Any

from byte_text import arguments, windows
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from rksp_core.integrations.huggingface import RkspCallback

LENGTH = 64


class Windows:
    """A data set of byte windows, as the Trainer wants it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    """Train."""
    if resume := "--resume" in sys.argv:
        sys.argv.remove("--resume")
    options = arguments(__doc__)
    options.run.mkdir(parents=True, exist_ok=True)
    rows = windows(options.text, LENGTH)
    probe = {"input_ids": rows[:32].clone()}
    save_file(probe, options.run / "probe.safetensors")  # the watcher replays the same one

    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes)
    config.save_pretrained(options.run)
    settings = TrainingArguments(
        output_dir=str(options.run),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_steps=200,
        save_total_limit=3,
        logging_steps=10,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )

    callback = RkspCallback(options.run, probe=probe, profile_every=options.profile_every)
    trainer = Trainer(LlamaForCausalLM(config), settings, train_dataset=Windows(rows), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    main()
