"""The MODEL argument of the command line -> a torch module, ready to be profiled.

Three kinds of source, told apart by their form:

``package.module:factory``     a callable that returns a module; the current folder can be imported
``folder/`` or ``config.json`` a Hugging Face model (`rksp_monitor.huggingface`)
``run.yaml``                   a trainer's configuration: ``model: {factory: "package.module:name", arguments: {...}}``
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rksp_core.errors import ModelError, RkspError

if TYPE_CHECKING:
    from torch import nn

_FORMS = "MODEL is package.module:factory, a Hugging Face folder or its config.json, or a trainer's YAML configuration"


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode on the CPU, and what is known of its input.

    ``vocabulary`` is the number of token ids it takes (None when it does not take tokens, or hides it),
    ``max_length`` the longest sequence (None when unlimited or unknown). ``warnings`` are sentences for the report.
    """

    module: nn.Module
    source: str
    kind: Literal["factory", "huggingface", "trainer"]
    weights: Literal["random", "pretrained"]
    vocabulary: int | None = None
    max_length: int | None = None
    warnings: tuple[str, ...] = ()


def load_model(source: str, *, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> LoadedModel:
    """Import, build or read the model that ``source`` names.

    Parameters
    ----------
    source
        See the module's docstring.
    arguments
        Keyword arguments of the factory; they override those of a trainer's YAML, and the fields of a Hugging Face
        configuration.
    seed
        Seeds torch, NumPy and `random` while the model is built; their states are put back afterwards.

    Raises
    ------
    ModelError
        When there is no such module, folder or file, or what is there cannot be built.
    """
    arguments = dict(arguments or {})
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return _from_trainer(path, arguments, seed)
    if path.is_dir() or path.suffix == ".json":
        from rksp_monitor.huggingface import load_huggingface

        return load_huggingface(path, arguments, seed)
    if ":" not in source:
        raise ModelError(f"no model {source!r} here; {_FORMS}")
    module = call_factory(source, arguments, [Path.cwd()], seed)
    return _describe(module, source, "factory")


def code_folder(source: str) -> Path:
    """Return the folder that the code of a model is looked for in first.

    A trainer runs from some folder above its configuration: the nearest one that holds the factory's package. For
    every other source, and where there is none, it is the current folder.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        with contextlib.suppress(ModelError):  # `load_model` says what is wrong
            top = _read_trainer(path)[0].partition(":")[0].partition(".")[0]
            for folder in path.resolve().parents:
                if (folder / top).is_dir() or (folder / f"{top}.py").is_file():
                    return folder
    return Path.cwd()


def _from_trainer(path: Path, arguments: Mapping[str, Any], seed: int) -> LoadedModel:
    """Build the model of a trainer's YAML as the trainer would."""
    factory, given = _read_trainer(path)
    folders = dict.fromkeys([Path.cwd(), code_folder(str(path))])
    module = call_factory(factory, {**given, **arguments}, list(folders), seed)
    return _describe(module, str(path), "trainer")


def _read_trainer(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the factory and the arguments that a trainer's YAML names."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{path} is no trainer's configuration: {_one_line(error)}") from error
    model = document.get("model") if isinstance(document, dict) else None
    factory = model.get("factory") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(factory, str):
        raise ModelError(
            f'{path} names no model; expected `model: {{factory: "package.module:name", arguments: {{}}}}`'
        )
    given = model.get("arguments") or {}
    if not isinstance(given, dict):
        raise ModelError(
            f"model.arguments in {path} is a {type(given).__name__}, expected a mapping of names to values"
        )
    return factory, given


def call_factory(reference: str, arguments: Mapping[str, Any], folders: Iterable[Path], seed: int) -> nn.Module:
    """Import ``package.module:factory``, looking in ``folders`` too, and call it with a seeded random state."""
    from torch import nn

    factory = import_object(reference, folders)
    # What a factory prints is not the result, which alone belongs on stdout.
    with seeded(seed), user_code(f"the factory {reference}"), contextlib.redirect_stdout(sys.stderr):
        module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ModelError(f"the factory {reference} returned a {type(module).__name__}, expected a torch.nn.Module")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ModelError(f"the factory {reference} returned a model on the meta device; build it with real weights")
    return module.eval()


def import_object(reference: str, folders: Iterable[Path]) -> Callable[..., Any]:
    """Import the callable that ``package.module:name`` means.

    The folders stay on ``sys.path``, as they do for ``python -m``: a model may import its parts when it first runs.

    Raises
    ------
    ModelError
        When the module does not exist, fails to import, or has no such callable.
    """
    name, _, attribute = reference.partition(":")
    if not name or not attribute:
        raise ModelError(f"{reference!r} names no callable; expected package.module:name")
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        with user_code(f"importing {name}"):
            target: Any = importlib.import_module(name)
    except ModelError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{name}.".startswith(f"{cause.name}."):
            where = " or ".join(str(folder) for folder in folders)
            raise ModelError(
                f"no module {cause.name!r} is installed, or in {where}; put its folder on PYTHONPATH if it lies "
                f"elsewhere; {_FORMS}"
            ) from cause
        raise
    for part in attribute.split("."):
        if not hasattr(target, part):
            offers = ", ".join(sorted(key for key in vars(target) if not key.startswith("_"))[:12]) or "nothing"
            raise ModelError(f"{name} has no {part!r}; it offers {offers}")
        target = getattr(target, part)
    if not callable(target):
        raise ModelError(f"{reference} is a {type(target).__name__}, expected a callable")
    return target  # type: ignore[no-any-return]


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one sentence that names the exception and its line."""
    try:
        yield
    except (RkspError, MemoryError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            raise  # the caller knows what to lower
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if frame.filename == __file__ else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise ModelError(f"{what} raised {type(error).__name__}: {_one_line(error)}{place}") from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random states that a factory may draw its weights from, and put them back."""
    import numpy as np
    import torch

    from rksp_core.untouched import random_state_kept

    with random_state_kept():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the global state is what a factory uses
        yield


def _describe(module: nn.Module, source: str, kind: Literal["factory", "trainer"]) -> LoadedModel:
    return LoadedModel(module, source, kind, "random", *_input_limits(module))


def _input_limits(module: nn.Module) -> tuple[int | None, int | None]:
    """Vocabulary and longest sequence, by the names and embeddings that models commonly have; None when hidden."""
    from torch import nn

    def attribute(*names: str) -> int | None:
        for owner in (module, getattr(module, "config", None)):
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    vocabulary = attribute("vocabulary", "vocab_size")
    max_length = attribute(
        "max_length", "max_position_embeddings", "n_positions", "max_seq_len", "block_size", "length"
    )
    tokens: list[int] = []
    positions: list[int] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            (positions if "pos" in name or "wpe" in name else tokens).append(part.num_embeddings)
    return vocabulary or max(tokens, default=None), max_length or max(positions, default=None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
