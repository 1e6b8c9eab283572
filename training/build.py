"""From a configuration to live parts: the model that its factory makes, the task, the rate of a step."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import shutil
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rksp_core import find_blocks
from rksp_core.errors import ConfigError, NoBlocksError
from training.config import Config, Model, Schedule
from training.names import nearest, unknown_key
from training.schema.task import Task as TaskSection
from training.stabilizers import apply_parametrizations
from training.tasks import Task
from training.tasks.associative_recall import AssociativeRecall
from training.tasks.images import Images
from training.tasks.synthetic_lm import SyntheticLM
from training.tasks.text import Text

# Each takes the settings of its section as they are named there.
TASKS: dict[str, Callable[..., Task]] = {
    "associative_recall": AssociativeRecall,
    "synthetic_lm": SyntheticLM,
    "text": Text,
    "images": Images,
}


def build_model(model: Model, seed: int) -> nn.Module:
    """Import the factory and call it with its arguments, torch seeded with ``seed``.

    Raises
    ------
    ConfigError
        When the factory cannot be imported, has no such argument, refuses a value, or returns a model without blocks.
    """
    factory = _import(model.factory)
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError as error:
        raise ConfigError(f"model.factory: {model.factory} has no arguments by name ({error}); name another") from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in model.arguments:
            if key not in parameters:
                raise ConfigError(unknown_key("model.arguments", key, parameters))
    torch.manual_seed(seed)
    try:
        module = factory(**model.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{model.factory} refused model.arguments: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{model.factory} returned a {type(module).__name__}, expected a torch.nn.Module")
    try:
        find_blocks(module)
    except NoBlocksError as error:
        raise ConfigError(
            f"{model.factory} returned a {type(module).__name__} without a stack of residual blocks; "
            "let it hold them in an nn.ModuleList"
        ) from error
    return module


def prepare_model(config: Config, model: nn.Module) -> nn.Module:
    """Give a fresh model what the configuration asks for; its parameters keep their names where they stay plain.

    Raises
    ------
    ConfigError
        When it cannot be had.
    """
    if config.precision == "float64":
        model = model.double()
    apply_parametrizations(config.stabilizers, model)
    if config.activation_checkpointing:
        for block in find_blocks(model):
            # the forward itself, not a wrapping module: names stay, and hooks of the block stay outside
            block.module.forward = functools.partial(checkpoint, block.module.forward, use_reentrant=False)
    if config.compile:
        if next(model.parameters()).device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ConfigError("compile: true needs a C++ compiler on a CPU, and none is on the path; install g++")
        model.compile()
    return model


def build_task(task: TaskSection, seed: int) -> Task:
    """Return the task; its batches depend on ``seed`` and the step only.

    Raises
    ------
    ConfigError
        When its settings contradict each other, or its data is not there.
    """
    return TASKS[task.name](**task.model_dump(exclude={"name", "batch"}), seed=seed)


def learning_rate(peak: float, schedule: Schedule, step: int, steps: int) -> float:
    """Return the rate of update ``step``, 1..steps: a linear rise to ``peak`` at ``warmup``, then the schedule."""
    if step < schedule.warmup:
        return peak * step / schedule.warmup
    if schedule.name == "constant":
        return peak
    progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
    return peak * (schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * progress)) / 2)


def _import(reference: str) -> Callable[..., object]:
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model.factory: cannot import {module_name!r} ({error}); run from the folder above it"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        near = nearest(name, [key for key, value in vars(module).items() if callable(value)])
        hint = f"did you mean {near!r}?" if near else "name a class or a function in it"
        raise ConfigError(f"model.factory: {module_name} has no {name!r}; {hint}")
    return factory
