"""One arm of the demo: a trainer and a watcher beside it, both real processes that meet on files and HTTP alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rksp_core.errors import ConfigError, RkspError

POLL_INTERVAL = 0.1  # seconds between two scans of the watcher: the demo's steps take milliseconds

GAUGES = {
    "judged_step": "rksp_checkpoint_last_processed_step",
    "risk": "rksp_risk_level",
    "mass": "rksp_near_unit_mass_min_ratio",
    "mass_drift": "rksp_near_unit_mass_drift",
    "kreiss_drift": "rksp_kreiss_constant_drift",
    "applied": "rksp_kss_applied_weight",
    "backs": "rksp_control_rollbacks_total",
    "desired_generation": "rksp_control_desired_generation",
    "applied_generation": "rksp_control_applied_generation",
}


@dataclass(frozen=True)
class Sample:
    """What one look at an arm saw: the trainer's last line, and the watcher's metrics as a scrape gives them."""

    seconds: float
    step: int | None = None
    loss: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    judged_step: float | None = None
    risk: float | None = None
    mass: float | None = None
    mass_drift: float | None = None
    kreiss_drift: float | None = None
    applied: float | None = None
    backs: float | None = None
    desired_generation: float | None = None
    applied_generation: float | None = None


class Arm:
    """A run folder, its trainer and its watcher.

    Parameters
    ----------
    name
        Names the run.
    checkout
        The folder that holds ``training/``.
    config
        The trainer's YAML.
    folder
        The run folder; it must not hold a run.
    enforce
        Whether the watcher writes orders.
    seed
        Of the run.
    watch_config
        Settings of the watcher; None: its defaults.
    """

    def __init__(
        self,
        name: str,
        *,
        checkout: Path,
        config: Path,
        folder: Path,
        enforce: bool,
        seed: int,
        watch_config: Path | None = None,
    ) -> None:
        self.name, self.folder, self.enforce = name, folder, enforce
        self.samples: list[Sample] = []
        self._checkout, self._config, self._seed, self._watch_config = checkout, config, seed, watch_config
        self._trainer: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> subprocess.Popen[bytes]:
        """Start the trainer up to step 0: both arms then begin from the same checkpoint, with their watcher awake."""
        self._trainer = self._start("trainer", *self._training(), "--until", "0")
        return self._trainer

    def watch(self) -> None:
        """Start the watcher, on a free port of the loopback address.

        Raises
        ------
        RkspError
            When the trainer could not prepare the run.
        """
        if self._trainer is None or self._trainer.wait() != 0:
            raise RkspError(f"the trainer could not begin: {self._last_words('trainer')}")
        mode = "--enforce" if self.enforce else "--observe"
        arguments = ["--listen", "127.0.0.1:0", "--port-file", str(self.folder / "port"), mode]
        arguments += ["--poll-interval", str(POLL_INTERVAL), "--device", "cpu"]
        if self._watch_config is not None:
            arguments += ["--config", str(self._watch_config)]
        self._watcher = self._start("watcher", "-m", "rksp_monitor", "watch", str(self.folder), *arguments)

    def ready(self) -> bool:
        """Whether the watcher has judged step 0.

        Raises
        ------
        RkspError
            When the watcher ended instead.
        """
        if self._watcher is not None and self._watcher.poll() is not None:
            raise RkspError(f"the watcher ended early: {self._last_words('watcher')}")
        return self._metrics().get("judged_step") is not None

    def train(self) -> None:
        """Start the trainer from step 0."""
        self._began = time.monotonic()
        self._trainer = self._start("trainer", *self._training(), "--resume")

    def look(self) -> Sample:
        """Take and keep a sample."""
        line = _last_line(self.folder / "metrics.jsonl")
        sample = Sample(
            seconds=time.monotonic() - self._began,
            step=line.get("step"),
            loss=line.get("loss"),
            gradient_norm=line.get("gradient_norm"),
            learning_rate=line.get("learning_rate"),
            **self._metrics(),
        )
        self.samples.append(sample)
        return sample

    @property
    def training(self) -> bool:
        """Whether the trainer is still at work."""
        return self._trainer is not None and self._trainer.poll() is None

    @property
    def caught_up(self) -> bool:
        """Whether the watcher has judged the last profile that the trainer wrote."""
        last = max((int(path.stem.split("-")[1]) for path in self.folder.glob("profiles/step-*.json")), default=0)
        judged = self.samples[-1].judged_step if self.samples else None
        return judged is not None and judged >= last

    def stop(self) -> None:
        """End both processes: politely, then not."""
        for process in (self._trainer, self._watcher):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (self._trainer, self._watcher):
            if process is None:
                continue
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def result(self) -> dict[str, Any]:
        """Return the trainer's ``result.json``.

        Raises
        ------
        RkspError
            When the trainer left none: it crashed.
        """
        try:
            document: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RkspError(f"the trainer of {self.name} left no result: {self._last_words('trainer')}") from error
        return document

    def steps(self) -> list[dict[str, Any]]:
        """Return the trainer's log, one entry a step."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def _training(self) -> tuple[str, ...]:
        settings = {"output": self.folder, "run_id": self.name, "seed": self._seed}
        flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return ("-m", "training", str(self._config), *flags)

    def _start(self, role: str, *arguments: str) -> subprocess.Popen[bytes]:
        # One thread each: two trainers share two cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{role}.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, *arguments],
                cwd=self._checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _metrics(self) -> dict[str, float]:
        """Scrape the watcher; what it does not export yet is left out."""
        try:
            address = (self.folder / "port").read_text(encoding="utf-8").strip()
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as response:
                text = response.read().decode()
        except (OSError, urllib.error.URLError):
            return {}
        values = {
            sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
        }
        return {name: values[metric] for name, metric in GAUGES.items() if metric in values}

    def _last_words(self, role: str) -> str:
        path = self.folder / f"{role}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
        return f"{lines[-1] if lines else 'it said nothing'} (see {path})"


def find_checkout() -> Path:
    """Return the folder that holds ``training/``: the current one, or the one this package was installed from.

    Raises
    ------
    ConfigError
        When there is none.
    """
    import rksp_monitor

    for folder in (Path.cwd(), Path(rksp_monitor.__file__).resolve().parents[1]):
        if (folder / "training" / "__main__.py").exists():
            return folder
    raise ConfigError(
        "the demo trains with the bundled trainer `training/`, which is in the repository and not in the wheel; "
        "run it in a checkout"
    )


def _last_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of a JSONL file as a mapping; empty when there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().split(b"\n")[:-1]
        document = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return document if isinstance(document, dict) else {}
