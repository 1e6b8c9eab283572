"""Checkpoints and profiles of a run that goes on while its watcher is tried, and a trainer that obeys orders."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from rksp_core import ProfileWriter
from rksp_core.control import ORDER_FILE, ControlListener
from tests.core.profiles import profile
from tests.monitor import tiny_model
from tests.soak.beside import Beside

MODEL = "tests.monitor.tiny_model:build"
ARGUMENTS = {"width": 8, "depth": 1}  # a replay of about 0.1 s

# One rule on one figure of the trainer's own profiles, so that the orders follow from the stream alone.
LARGE = 1000.0
POLICY = {
    "raise_after": 1,
    "clear_after": 1,
    "cooldown_steps": 0,
    "ratchet": False,
    "expires_in": 86400.0,
    "ladder": {0: {"alpha": 0.0}, 3: {"alpha": 0.15}},
    "rules": [
        {
            "name": "gradient_norm_is_large",
            "level": 3,
            "all": [{"metric": "gradient_norm", "against": "absolute", "direction": "rises", "by": 500.0}],
        }
    ],
}


class Templates:
    """A few checkpoints, made once: writing one is a copy and a rename, as a trainer's is."""

    def __init__(self, folder: Path, count: int = 8) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = []
        for number in range(count):
            path = folder / f"{number}.safetensors"
            save_file(small_weights(number), path)
            self._files.append(path.read_bytes())

    def write(self, run: Path, step: int) -> Path:
        """Write checkpoints/step-N: filled under a dot name, then renamed, which makes it complete."""
        staging = run / "checkpoints" / f".step-{step:08d}.tmp"
        staging.mkdir(parents=True)
        (staging / "model.safetensors").write_bytes(self._files[step % len(self._files)])
        (staging / "checkpoint.json").write_text(json.dumps({"schema": "rksp.checkpoint/1", "step": step}))
        return staging.rename(run / "checkpoints" / f"step-{step:08d}")


def small_weights(seed: int) -> dict:
    """Return a state dict of the model that `ARGUMENTS` describe."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = tiny_model.build(**ARGUMENTS).state_dict()
    del state["head.weight"]
    return state


def write_profile(run: Path, step: int, *, alarm: bool = False) -> Path:
    """Write a profile as the trainer does; its masses move a little from step to step."""
    moved = profile(near_unit_mass=0.75 + 0.01 * (step % 7), henrici_departure=0.1 + 0.001 * (step % 5))
    return ProfileWriter(run, every=1).write(moved, step, loss=2.0, gradient_norm=LARGE if alarm else 1.0)


class Trainer(Beside):
    """Stands in for a trainer: polls its control folder, obeys, and keeps every order it saw, with its bytes."""

    def __init__(self, run: Path, name: str) -> None:
        super().__init__()
        self._listener = ControlListener(run / "control", name)
        self._order = run / "control" / ORDER_FILE
        self.orders: list[tuple[int, bytes]] = []  # (generation, the file's bytes), whenever the file changed
        self.obeyed: list[int] = []
        self.step = 0

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.step += 1
            with contextlib.suppress(OSError):
                content = self._order.read_bytes()
                if not self.orders or self.orders[-1][1] != content:
                    self.orders.append((json.loads(content)["generation"], content))
            with contextlib.suppress(OSError):
                order = self._listener.poll(self.step)
                if order is not None:
                    self._listener.acknowledge(order, self.step)
                    self.obeyed.append(order.generation)


class Writer(Beside):
    """Writes checkpoints and profiles of a run, one after another, until the context ends.

    Every tenth profile is an alarm, so that an order is due twice in ten profiles.
    """

    def __init__(self, run: Path, templates: Templates, *, every: float, profiles_each: int = 4) -> None:
        super().__init__()
        self._run, self._templates, self._every, self._profiles_each = run, templates, every, profiles_each
        self.checkpoints = self.profiles = 0

    def run(self) -> None:
        while not self._over.is_set():
            self.checkpoints += 1
            self._templates.write(self._run, 10 * self.checkpoints)
            for number in range(1, self._profiles_each + 1):
                self.profiles += 1
                step = 10 * self.checkpoints + number  # between this checkpoint and the next
                write_profile(self._run, step, alarm=self.profiles % 10 == 0)
                self._over.wait(self._every / self._profiles_each)


def copy_of(run: Path, to: Path) -> Path:
    """Copy what the trainer wrote, without what a watcher added."""
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns(".rksp", "control"))
