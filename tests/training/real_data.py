"""Where the data of a task is missing, a test is skipped; with CI set it fails: there everything is installed."""

import importlib.util
import os
from pathlib import Path

import pytest

from training.schema.task import FASHION_MNIST


def need_data(task) -> None:
    """Go on when the data that a task's section names is here."""
    if task.name == "text":
        need(Path(task.path).exists(), f"no {task.path}; scripts/real_data.py makes it")
    elif task.name == "images" and task.data == "digits":
        need(importlib.util.find_spec("sklearn") is not None, "scikit-learn is not installed")
    elif task.name == "images" and task.data == "cifar10":
        if not Path(task.path).is_dir():
            pytest.skip(f"no {task.path}, and no package that brings it")  # also in CI
    elif task.name == "images":
        folder = task.path or FASHION_MNIST
        need(Path(folder).is_dir(), f"no {folder}; scripts/real_parts.sh installs it")


def need(here: bool, message: str) -> None:
    """Go on when a part is here."""
    if not here:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
