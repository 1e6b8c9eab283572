"""``python -m training CONFIG.yaml``: train one model, or go on with a run that was interrupted.

Exit codes: 0 the run finished, or stopped cleanly on SIGTERM, SIGUSR1, Ctrl-C or --until (``--resume`` goes on with
it); 2 usage or configuration error; 4 the run diverged (label ``rksp`` of `training.labels`), which is a finding and no
crash; 130 a second Ctrl-C. An unknown error keeps Python's traceback and exit code 1.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from rksp_core.errors import ConfigError
from training.command import carried_out
from training.config import Config, read_config

DIVERGED = 4
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="training: %(message)s", stream=sys.stderr)
    logging.getLogger("training").setLevel(logging.INFO)
    return carried_out("training", lambda: _work(arguments), "--resume goes on from the newest checkpoint")


def _work(arguments: argparse.Namespace) -> int:
    if arguments.until is not None and arguments.until < 0:
        raise ConfigError(f"--until takes a step of at least 0, got {arguments.until}")
    config = read_config(arguments.config, arguments.set)
    return _check(config) if arguments.check else _train(config, resume=arguments.resume, until=arguments.until)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train a small model from a YAML file.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--check", action="store_true", help="validate, build the model, and train nothing")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop cleanly after this step")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. optimizer.learning_rate=0.01"
    )
    return parser


def _check(config: Config) -> int:
    from rksp_core.device import choose_device
    from training.ranks import Ranks
    from training.run import build_run

    run = build_run(config, Ranks(0, 1, choose_device(config.device)))
    count = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{config.run_id}: the configuration is valid ({count:,} parameters, {config.steps} steps)")
    return 0


def _train(config: Config, *, resume: bool, until: int | None) -> int:
    import torch

    from training.loop import train
    from training.ranks import Elsewhere, join, leave

    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU; the CPU's are deterministic anyway
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the second one is what Slurm sends before the time is over
        signal.signal(number, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, lambda *_: _interrupt(stopping))
    ranks, failed = join(config.device), True
    try:
        result = train(config, ranks, resume=resume, until=until, stop=stopping.is_set, say=_say)
        failed = False
    except Elsewhere as error:
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ConfigError(
            f"cannot write to {config.output} ({error.strerror}); free some space or change output"
        ) from error
    finally:
        leave(ranks, failed=failed)
    if ranks.first:
        _say(_summary(config, result))
    return DIVERGED if result["status"] == "diverged" else 0


def _interrupt(stopping: threading.Event) -> None:
    """Stop cleanly at the first Ctrl-C, and at once at the second."""
    if stopping.is_set():
        raise KeyboardInterrupt
    stopping.set()


def _summary(config: Config, result: dict[str, Any]) -> str:
    ending = f"{result['status']} at step {result['step']} of {config.steps}"
    if result["status"] == "diverged":
        ending = f"diverged at step {result['diverged_at']['rksp']} of {config.steps}"
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    figures = f"held-out loss {loss}, accuracy {result['accuracy']:.3f}"
    if result.get("perplexity") is not None:
        figures += f", perplexity {result['perplexity']:.4g}"
    return f"{config.run_id} {ending}: {figures} ({config.output})"


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
